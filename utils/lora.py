"""LoRA files of the UNet: read in every layout in use, attached so that nothing is silently left out, written for diffusers.

A LoRA adds `alpha / rank * up @ down` to the weight of a module. Three layouts name the same tensors:

    legacy   down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight     the paper's .bin
    modern   unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight          diffusers
    kohya    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight     A1111, ComfyUI

In memory a LoRA is a dict from the module's flat name (dots written as "_", as kohya's) to its down and up matrices and
alpha, so the three agree whatever the file said.
"""

import io
import json
import re
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from utils.errors import UserError
from utils.jsonl import write_whole

TARGET_MODULES = ["to_q", "to_k", "to_v", "to_out.0"]  # of every attention, as published
FILE_NAMES = ("pytorch_lora_weights.safetensors", "adapted_model.bin", "pytorch_lora_weights.bin")

ROLES = {"down": "down", "up": "up", "lora_A": "down", "lora_B": "up", "lora_down": "down", "lora_up": "up"}
KEY = re.compile(
    r"(?:unet\.|lora_unet_|base_model\.model\.)?(?P<module>.+?)"
    r"(?:_lora\.|\.lora\.|\.(?=lora_[ABdu]))(?P<role>down|up|lora_[AB]|lora_down|lora_up)(?:\.default)?\.weight"
)

PEFT_HEADER = "lora_adapter_metadata"
# A flat name is taken apart at these words, the module names of diffusers' UNets.
WORDS = re.compile(
    r"(?:down_blocks|mid_block|up_blocks|attentions|resnets|motion_modules|downsamplers|upsamplers|transformer_blocks|"
    r"attn1|attn2|to_q|to_k|to_v|to_out|ff|net|proj_in|proj_out|proj|conv_in|conv_out|conv_shortcut|conv1|conv2|conv|"
    r"time_emb_proj|time_embedding|add_embedding|linear_1|linear_2|\d+)(?=_|$)"
)


class Matrices(NamedTuple):
    """What one module gets: `alpha / down.shape[0] * up @ down`."""

    down: torch.Tensor  # (rank, in)
    up: torch.Tensor  # (out, rank)
    alpha: float


def read(path: str | Path) -> dict[str, Matrices]:
    """Read a LoRA from a file of any layout, or from the folder that holds one; UserError if it is none."""
    path = find(path)
    state, metadata = load_tensors(path)
    found: dict[str, dict] = {}
    for key, tensor in state.items():
        if key.endswith(".alpha"):
            module, role = key.removesuffix(".alpha").removeprefix("unet.").removeprefix("lora_unet_"), "alpha"
        elif match := KEY.fullmatch(key):
            module, role = match["module"], ROLES[match["role"]]
        else:
            raise UserError(f"{path}: {key!r} is no LoRA weight of a UNet")
        # The legacy layout says processor.to_out for what diffusers calls to_out.0.
        module = re.sub(r"\.processor\.to_out$", ".to_out.0", module).replace(".processor.", ".")
        found.setdefault(module.replace(".", "_"), {})[role] = tensor
    if not found:
        raise UserError(f"{path}: no LoRA weights in it")
    config = adapter_config(path, metadata)
    lora = {}
    for module, parts in found.items():
        if "down" not in parts or "up" not in parts or parts["down"].shape[0] != parts["up"].shape[1]:
            raise UserError(f"{path}: the LoRA of {module} is incomplete or its two matrices do not fit together")
        alpha = float(parts["alpha"]) if "alpha" in parts else config_alpha(config, module, parts["down"].shape[0])
        lora[module] = Matrices(parts["down"].float(), parts["up"].float(), alpha)
    return lora


def find(path: str | Path) -> Path:
    """Return the file itself, or the LoRA in a folder; UserError if there is none."""
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in FILE_NAMES if (path / name).is_file()), path / FILE_NAMES[0])
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return path


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of a .safetensors or torch.save file, and the header of the former."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as not_safetensors:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:
            raise UserError(f"{path}: neither a safetensors file ({not_safetensors}) nor torch.save's") from None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{path}: not a flat table of tensors")
    return state, {}


def header(path: str | Path) -> dict[str, str]:
    """Return what a LoRA file says of itself: the safetensors header, empty for a legacy file."""
    return load_tensors(find(path))[1]


def adapter_config(path: Path, metadata: dict[str, str]) -> dict:
    """Return PEFT's configuration, which diffusers keeps in the header instead of an alpha for each module."""
    try:
        config = json.loads(metadata.get(PEFT_HEADER, "{}"))
        return {key.removeprefix("unet."): value for key, value in config.items() if key.startswith("unet.")}
    except (ValueError, AttributeError):
        raise UserError(f"{path}: its header's {PEFT_HEADER} is not readable") from None


def config_alpha(config: dict, module: str, rank: int) -> float:
    """Return the alpha of a module (its flat name), as PEFT finds it; without a configuration alpha is the rank."""
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if f"_{module}".endswith("_" + pattern.lstrip("^").replace(".", "_")):
            alpha = value
    return float(alpha) * (rank**0.5 if config.get("use_rslora") else 1)


def write(path: str | Path, lora: dict[str, Matrices], layout: str, metadata: dict[str, str] | None = None):
    """Write a LoRA as "diffusers", "kohya" or "legacy", whole or not at all; `metadata` goes into the safetensors header.

    The legacy layout has neither header nor alpha: alpha / rank is multiplied into the up matrix.
    """
    path, state, metadata = Path(path), {}, dict(metadata or {})
    for name, (down, up, alpha) in lora.items():
        if layout == "kohya":
            state |= {f"lora_unet_{name}.lora_down.weight": down, f"lora_unet_{name}.lora_up.weight": up}
            state[f"lora_unet_{name}.alpha"] = torch.tensor(alpha)
        elif layout == "diffusers":
            state |= {f"unet.{dotted(name)}.lora.down.weight": down, f"unet.{dotted(name)}.lora.up.weight": up}
        else:
            attention, projection = re.fullmatch(r"(.*)\.(to_[qkv]|to_out)(?:\.0)?", dotted(name)).groups()
            key = f"{attention}.processor.{projection}_lora"
            state |= {f"{key}.down.weight": down, f"{key}.up.weight": up * (alpha / down.shape[0])}
    if layout == "diffusers" and any(alpha != down.shape[0] for down, _, alpha in lora.values()):
        metadata[PEFT_HEADER] = json.dumps({f"unet.{k}": v for k, v in peft_config(lora).items()})
    # Of two modules that share a matrix each gets its own: safetensors refuses shared memory.
    state = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    if layout == "legacy":
        torch.save(state, content)
    write_whole(
        path, content.getvalue() if layout == "legacy" else safetensors.torch.save(state, {"format": "pt"} | metadata)
    )


def peft_config(lora: dict[str, Matrices]) -> dict:
    """Return the arguments of PEFT's LoraConfig that describe the LoRA."""
    ranks = {dotted(name): down.shape[0] for name, (down, _, _) in lora.items()}
    alphas = {dotted(name): alpha for name, (_, _, alpha) in lora.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
    }


def dotted(name: str) -> str:
    """Return diffusers' name of a module from its flat one; UserError for words that no UNet's module has."""
    words = WORDS.findall(name)
    if "_".join(words) != name:
        raise UserError(f"{name!r} is no module of a UNet in diffusers' names")
    return ".".join(words)


def attach(unet, lora: dict[str, Matrices], adapter_name: str = "default"):
    """Add the LoRA to a diffusers UNet as a PEFT adapter; UserError if a module is missing there or has another shape."""
    state = {}
    for module, (down, up, alpha) in places(unet, lora).items():
        state[f"{module}.lora_A.weight"] = down
        state[f"{module}.lora_B.weight"] = up * (alpha / down.shape[0])
    unet.load_lora_adapter(state, prefix=None, adapter_name=adapter_name)
    if adapter_name not in getattr(unet, "peft_config", {}):
        raise RuntimeError("diffusers did not attach the LoRA")


@torch.no_grad()
def fuse(unet, lora: dict[str, Matrices], scale: float = 1.0):
    """Add `scale * alpha / rank * up @ down` to the UNet's weights in place; UserError, before any change, if it does not fit."""
    for module, (down, up, alpha) in places(unet, lora).items():
        weight = unet.get_submodule(module).weight
        down, up = down.to(weight.device), up.to(weight.device)
        change = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * (scale * alpha / down.shape[0])
        # The sum is rounded to the weights' precision once.
        weight.copy_(weight.float() + change)


def places(unet, lora: dict[str, Matrices]) -> dict[str, Matrices]:
    """Return the LoRA by the UNet's own module names; UserError if a module is missing there or has another shape."""
    names = {name.replace(".", "_"): name for name, module in unet.named_modules() if hasattr(module, "weight")}
    missing = [name for name in lora if name not in names]
    if missing:
        raise UserError(
            f"the LoRA does not fit this UNet: {len(missing)} of its {len(lora)} modules are not there, such as {missing[0]}"
        )
    for name, (down, up, _) in lora.items():
        weight = unet.get_submodule(names[name]).weight
        if weight.shape != up.shape[:1] + down.shape[1:]:
            raise UserError(
                f"the LoRA does not fit this UNet: {names[name]} is {tuple(weight.shape)}, "
                f"the LoRA is for {(up.shape[0], *down.shape[1:])}"
            )
    return {names[name]: matrices for name, matrices in lora.items()}


def save(folder: str | Path, unet, metadata: dict[str, str] | None = None):
    """Write the UNet's adapter as `pytorch_lora_weights.safetensors` in diffusers' layout, whole or not at all."""
    from peft.utils import get_peft_model_state_dict

    state = {key: tensor.float() for key, tensor in get_peft_model_state_dict(unet).items()}
    alpha = next(iter(unet.peft_config.values())).lora_alpha
    downs = {key.removesuffix(".lora_A.weight"): down for key, down in state.items() if ".lora_A." in key}
    lora = {
        module.replace(".", "_"): Matrices(down, state[f"{module}.lora_B.weight"], alpha)
        for module, down in downs.items()
    }
    write(Path(folder) / FILE_NAMES[0], lora, "diffusers", metadata)


def training_metadata(settings: dict) -> dict[str, str]:
    """Return what a file says of its training: the base model, the negative prompt to use, and all options."""
    return {
        "base_model": str(settings["pretrained_model_name_or_path"]),
        "negative_prompt": settings["negative_prefix"],
        "options": json.dumps(settings, ensure_ascii=False),
    }
