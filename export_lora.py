"""Convert a LoRA between the layouts in use, or fuse it into Stable Diffusion.

    python export_lora.py --unet_weight logs --output align_sd.safetensors --format kohya      # AUTOMATIC1111, Forge, ComfyUI
    python export_lora.py --unet_weight adapted_model.bin --output lora.safetensors --format diffusers
    python export_lora.py --unet_weight logs --output adapted_model.bin --format legacy        # diffusers 0.13, the original
    python export_lora.py --unet_weight logs --output stable-diffusion-adapted --format fused  # a whole pipeline

Reads   --unet_weight: a LoRA in any of these layouts and of any rank, or the folder that holds one
        --pretrained_model_name_or_path, for `fused` only
Writes  OUTPUT: a file, or with `fused` a folder that diffusers loads as a pipeline; whole or not at all

The weights are copied as they are: a round trip is exact. Only the legacy layout has no alpha, so there alpha / rank is
multiplied into the up matrix. What the file says of its training (base model, options, the negative prompt to use)
travels in the safetensors header; the legacy layout cannot hold it.
"""

import argparse
import shutil
from pathlib import Path

from utils import lora
from utils.errors import UserError, one_line_errors


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unet_weight", required=True, help="the LoRA, a file or a folder")
    parser.add_argument("--output", required=True, help=".safetensors, .bin for legacy, a folder for fused")
    parser.add_argument("--format", required=True, choices=["diffusers", "kohya", "legacy", "fused"])
    parser.add_argument("--lora_scale", type=float, default=1.0, help="strength of the LoRA in a fused pipeline")
    parser.add_argument("--pretrained_model_name_or_path", help="for fused (default: the base model the LoRA names)")
    parser.add_argument("--precision", choices=["fp32", "fp16"], default="fp16", help="of a fused pipeline")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT")
    return parser.parse_args(argv)


def main(args):
    output = Path(args.output)
    suffix = {"diffusers": ".safetensors", "kohya": ".safetensors", "legacy": ".bin", "fused": ""}[args.format]
    if suffix and output.suffix != suffix:
        raise UserError(f"--output {output}: --format {args.format} is a {suffix} file")
    if output.exists() and not args.overwrite:
        raise UserError(f"--output {output}: exists; use --overwrite or another place")
    if output.is_dir() and not (args.format == "fused" and (output / "model_index.json").is_file()):
        raise UserError(f"--output {output}: a folder that is no pipeline; use another place")
    matrices, metadata = lora.read(args.unet_weight), lora.header(args.unet_weight)
    metadata = {key: value for key, value in metadata.items() if key not in ("format", lora.PEFT_HEADER)}

    if args.format == "fused":
        fuse_pipeline(args, matrices, metadata, output)
    elif args.format == "kohya":
        lora.write(output, matrices, "kohya", kohya_metadata(matrices, metadata) | metadata)
    else:
        metadata = {key: value for key, value in metadata.items() if not key.startswith("ss_")}
        lora.write(output, matrices, args.format, metadata)
    print(f"{output}: {args.format}, {len(matrices)} modules of rank {', '.join(map(str, ranks(matrices)))}")
    if metadata.get("negative_prompt"):
        print(f"use it with the negative prompt {metadata['negative_prompt']!r}")


def ranks(matrices: dict[str, lora.Matrices]) -> list[int]:
    """Return the ranks that occur."""
    return sorted({down.shape[0] for down, _, _ in matrices.values()})


def kohya_metadata(matrices: dict[str, lora.Matrices], metadata: dict[str, str]) -> dict[str, str]:
    """Return the header entries that kohya's trainer writes and the web interfaces show."""
    rank, alphas = ranks(matrices), sorted({alpha for _, _, alpha in matrices.values()})
    found = {"ss_network_module": "networks.lora"}
    found["ss_network_dim"] = str(rank[0]) if len(rank) == 1 else "Dynamic"
    found["ss_network_alpha"] = str(alphas[0]) if len(alphas) == 1 else "Dynamic"
    # The text encoder's width tells Stable Diffusion 1 from 2.
    width = next((down.shape[1] for name, (down, _, _) in matrices.items() if name.endswith("attn2_to_k")), None)
    if width in (768, 1024):
        found["ss_base_model_version"] = {768: "sd_v1", 1024: "sd_v2"}[width]
        found["ss_v2"] = str(width == 1024)  # what AUTOMATIC1111 goes by
    if "base_model" in metadata:
        found["ss_sd_model_name"] = metadata["base_model"]
    if "negative_prompt" in metadata:
        found["ss_training_comment"] = f"use with the negative prompt {metadata['negative_prompt']!r}"
    return found


def fuse_pipeline(args, matrices: dict[str, lora.Matrices], metadata: dict[str, str], output: Path):
    """Write Stable Diffusion with the LoRA added to its UNet's weights."""
    import torch
    from diffusers import StableDiffusionPipeline

    base = args.pretrained_model_name_or_path or metadata.get("base_model") or "CompVis/stable-diffusion-v1-4"
    try:
        pipe = StableDiffusionPipeline.from_pretrained(
            base, dtype=torch.float32, safety_checker=None, requires_safety_checker=False
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--pretrained_model_name_or_path {base}: {reason}") from None
    lora.fuse(pipe.unet, matrices, args.lora_scale)
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipe.to(torch.float16 if args.precision == "fp16" else torch.float32).save_pretrained(temporary)
    if output.exists():
        shutil.rmtree(output) if output.is_dir() else output.unlink()
    temporary.rename(output)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
