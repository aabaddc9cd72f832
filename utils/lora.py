"""LoRA files of the UNet: read in every layout in use, attached so that nothing is silently left out, written for diffusers.

A LoRA adds `alpha / rank * up @ down` to the weight of a module. Three layouts name the same tensors:

    legacy   down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight     the paper's .bin
    modern   unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight          diffusers
    kohya    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight     A1111, ComfyUI

In memory a LoRA is a dict from the module's flat name (dots written as "_", as kohya's) to its down and up matrices and
alpha, so the three agree whatever the file said.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from utils.errors import UserError

TARGET_MODULES = ["to_q", "to_k", "to_v", "to_out.0"]  # of every attention, as published
FILE_NAMES = ("pytorch_lora_weights.safetensors", "adapted_model.bin", "pytorch_lora_weights.bin")

ROLES = {"down": "down", "up": "up", "lora_A": "down", "lora_B": "up", "lora_down": "down", "lora_up": "up"}
KEY = re.compile(
    r"(?:unet\.|lora_unet_|base_model\.model\.)?(?P<module>.+?)"
    r"(?:_lora\.|\.lora\.|\.(?=lora_[ABdu]))(?P<role>down|up|lora_[AB]|lora_down|lora_up)(?:\.default)?\.weight"
)


class Matrices(NamedTuple):
    """What one module gets: `alpha / down.shape[0] * up @ down`."""

    down: torch.Tensor  # (rank, in)
    up: torch.Tensor  # (out, rank)
    alpha: float


def read(path: str | Path) -> dict[str, Matrices]:
    """Read a LoRA from a file of any layout, or from the folder that holds one; UserError if it is none."""
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in FILE_NAMES if (path / name).is_file()), path / FILE_NAMES[0])
    if not path.is_file():
        raise UserError(f"{path}: no such file")
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
    lora = {}
    for module, parts in found.items():
        if "down" not in parts or "up" not in parts or parts["down"].shape[0] != parts["up"].shape[1]:
            raise UserError(f"{path}: the LoRA of {module} is incomplete or its two matrices do not fit together")
        rank = parts["down"].shape[0]
        # diffusers keeps PEFT's configuration in the header instead of an alpha for each module.
        alpha = float(parts["alpha"]) if "alpha" in parts else rank * metadata.get("alpha", 1) / metadata.get("rank", 1)
        lora[module] = Matrices(parts["down"].float(), parts["up"].float(), alpha)
    return lora


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Return the tensors of a .safetensors or torch.save file, and {"rank", "alpha"} if its header tells them."""
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        known = {"rank": header.get("unet.r"), "alpha": header.get("unet.lora_alpha")}
        return state, known if all(known.values()) else {}
    except SafetensorError as not_safetensors:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:
            raise UserError(f"{path}: neither a safetensors file ({not_safetensors}) nor torch.save's") from None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{path}: not a flat table of tensors")
    return state, {}


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


def save(folder: str | Path, unet):
    """Write the UNet's adapter as `pytorch_lora_weights.safetensors` (diffusers' names, alpha = rank), whole or not at all."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    layers = {key: tensor.detach().float().cpu().contiguous() for key, tensor in layers.items()}
    temporary = f".{FILE_NAMES[0].removesuffix('.safetensors')}.tmp.safetensors"
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, weight_name=temporary)
    (folder / temporary).replace(folder / FILE_NAMES[0])
