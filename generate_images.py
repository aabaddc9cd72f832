"""Generate a picture for every prompt, steered away from what people dislike by the negative prompt "Weird image. ".

    python generate_images.py --unet_weight checkpoint.bin --prompts prompt_list.json --folder output
    accelerate launch generate_images.py --unet_weight logs --prompts prompt_list.json --folder output

Reads   prompts: a JSON array of strings
        --unet_weight: the LoRA, as a legacy .bin, a modern or kohya .safetensors, or the folder that holds it; "" for none
Writes  FOLDER/{i}.jpg for prompt i, FOLDER/meta.json (an array of file_name, caption, seed) once all are there,
        FOLDER/run.json (the options; a folder of other pictures is refused)

Picture i starts from the noise of seed + i, so it does not depend on the batch size, the number of processes or on what
is already there. A killed run goes on where it stopped.
"""

import argparse
import io
import json
from pathlib import Path

from tqdm import tqdm

from utils import ranks, runs
from utils.errors import UserError, one_line_errors
from utils.jsonl import read_array, write_whole


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pretrained_model_name_or_path", default="CompVis/stable-diffusion-v1-4", help="the base model"
    )
    parser.add_argument("--unet_weight", default="", help="the LoRA; empty for the base model alone")
    parser.add_argument("--lora_scale", type=float, default=1.0, help="strength of the LoRA")
    parser.add_argument("--prompts", default="validation_prompts_500.json", help="JSON array of strings")
    parser.add_argument("--folder", default="dump", help="where the pictures go")
    parser.add_argument("--negative_prompt", default="Weird image. ", help='steer away from this; "" for none')
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, default=7.5)
    parser.add_argument("--height", type=int, help="pixels (default: what the model was trained for)")
    parser.add_argument("--width", type=int, help="pixels (default: what the model was trained for)")
    parser.add_argument("--seed", type=int, default=0, help="picture i starts from the noise of seed + i")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEG")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], help="default: fp16 on a GPU, fp32 on the CPU")
    parser.add_argument("--device", help="default: this process's GPU, else the CPU")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder made with other options")
    ranks.add_arguments(parser)
    return parser.parse_args(argv)


def main(args):
    rank, world_size = ranks.rank_and_world_size(args)
    prompts = read_prompts(args.prompts)
    folder = Path(args.folder)

    # See what is there, and refuse to mix it with pictures of another recipe.
    begin_folder(args, prompts, folder)
    todo = [i for i in range(rank, len(prompts), world_size) if not (folder / f"{i}.jpg").exists()]

    # Generate the missing pictures of this rank.
    if todo:
        pipe = load_pipeline(args)
        bar = tqdm(total=len(todo), desc=folder.name, unit="image", disable=rank > 0)
        for start in range(0, len(todo), args.batch_size):
            batch = todo[start : start + args.batch_size]
            images = generate(pipe, [prompts[i] for i in batch], [args.seed + i for i in batch], args)
            for i, image in zip(batch, images, strict=True):
                encoded = io.BytesIO()
                image.save(encoded, "JPEG", quality=args.quality)
                write_whole(folder / f"{i}.jpg", encoded.getvalue())
            bar.update(len(batch))
        bar.close()

    # The rank that finds every picture there finishes the folder.
    if all((folder / f"{i}.jpg").exists() for i in range(len(prompts))):
        rows = [{"file_name": f"{i}.jpg", "caption": p, "seed": args.seed + i} for i, p in enumerate(prompts)]
        write_whole(folder / "meta.json", json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
        if rank == 0:
            print(f"{len(prompts)} pictures in {folder} ({len(todo)} of them made now by this process)")


def read_prompts(path: str) -> list[str]:
    """Return the prompts of a JSON array of strings."""
    prompts = read_array(path)
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise UserError(f"{path}: element {i}: expected a string, found {prompt!r}")
    if not prompts:
        raise UserError(f"{path}: no prompts in it")
    return prompts


def begin_folder(args, prompts: list[str], folder: Path):
    """Record the recipe, or go on with pictures of the same; `--overwrite` removes those of another."""
    free = ("batch_size", "device", "folder", "overwrite", "rank", "world_size", "prompts")
    settings = {key: value for key, value in vars(args).items() if key not in free}
    settings["prompts"] = prompts
    if args.unet_weight:
        from utils import lora

        file = next(
            (Path(args.unet_weight) / n for n in lora.FILE_NAMES if (Path(args.unet_weight) / n).is_file()), None
        )
        settings["unet_weight"] = runs.sha256(file or args.unet_weight)
    folder.mkdir(parents=True, exist_ok=True)
    old = [*folder.glob("*.jpg"), *folder.glob("meta.json")]
    if args.overwrite:
        for path in old:
            path.unlink(missing_ok=True)
    # Without a picture there is nothing to mix with, such as after a mistyped option.
    runs.begin(folder / "run.json", settings, overwrite=args.overwrite or not old)


def load_pipeline(args):
    """Return the pipeline with the LoRA merged into its UNet. Nothing in it judges the pictures: no safety checker."""
    import torch
    from diffusers import StableDiffusionPipeline

    from utils import lora

    device = ranks.device(args.device)
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    dtype = dtypes[args.precision or ("fp32" if device.type == "cpu" else "fp16")]
    try:
        pipe = StableDiffusionPipeline.from_pretrained(
            args.pretrained_model_name_or_path, dtype=dtype, safety_checker=None, requires_safety_checker=False
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}: {reason}") from None
    if args.unet_weight:
        lora.attach(pipe.unet, lora.read(args.unet_weight))
        pipe.unet.fuse_lora(lora_scale=args.lora_scale)
        pipe.unet.unload_lora()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def generate(pipe, prompts: list[str], seeds: list[int], args) -> list:
    """Generate one picture a prompt, each from its own seed's noise (drawn on the CPU, the same on every device)."""
    import torch

    height = args.height or pipe.unet.config.sample_size * pipe.vae_scale_factor
    width = args.width or pipe.unet.config.sample_size * pipe.vae_scale_factor
    shape = (1, pipe.unet.config.in_channels, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    return pipe(
        prompts,
        negative_prompt=[args.negative_prompt] * len(prompts),
        latents=noise.to(pipe.device, pipe.dtype),
        height=height,
        width=width,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
    ).images


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
