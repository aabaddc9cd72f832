"""Generate pictures for every prompt, steered away from what people dislike by the negative prompt "Weird image. ".

    python generate_images.py --unet_weight checkpoint.bin --prompts prompt_list.json --folder output
    accelerate launch generate_images.py --unet_weight logs --prompts prompt_list.json --folder output

Reads   prompts: a JSON array of strings or of objects with "prompt", JSON Lines of either, or plain text, a prompt a line
        --unet_weight: the LoRA, as a legacy .bin, a modern or kohya .safetensors, or the folder that holds it; "" for none
Writes  FOLDER/{k}.jpg for picture k (of prompt k, or of prompt k // N with --images_per_prompt N), FOLDER/meta.json (an array
        of file_name, caption, seed) once all are there, FOLDER/run.json (the options; a folder of other pictures is refused)

Picture k starts from the noise of seed + k, so it does not depend on the batch size, the number of processes or on what is
already there. A killed run goes on where it stopped. Each picture carries its recipe, as AUTOMATIC1111's web UI reads it.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from utils import pipeline, prompts, ranks, recipe, runs
from utils.errors import UserError, one_line_errors
from utils.jsonl import write_whole

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


class Picture(NamedTuple):
    name: str
    prompt: str
    seed: int


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # what to draw
    parser.add_argument("--prompts", default="validation_prompts_500.json", help="JSON array, JSON Lines or text file")
    parser.add_argument("--folder", default="dump", help="where the pictures go")
    parser.add_argument("--images_per_prompt", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="picture k starts from the noise of seed + k")
    # with what
    parser.add_argument(
        "--pretrained_model_name_or_path", default="CompVis/stable-diffusion-v1-4", help="the base model"
    )
    parser.add_argument("--unet_weight", default="", help="the LoRA; empty for the base model alone")
    parser.add_argument("--lora_scale", type=float, default=1.0, help="strength of the LoRA")
    parser.add_argument(
        "--safety_checker", action="store_true",
        help="blacken what the model's own safety checker flags, and say so in meta.json; off by default: the original's "
        "silently saved black pictures",
    )  # fmt: skip
    # how
    parser.add_argument("--negative_prompt", default="Weird image. ", help='steer away from this; "" for none')
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, default=7.5)
    parser.add_argument(
        "--scheduler", choices=pipeline.SCHEDULERS, default="pndm", help="default: pndm, as in the paper"
    )
    parser.add_argument("--height", type=int, help="pixels (default: what the model was trained for)")
    parser.add_argument("--width", type=int, help="pixels (default: what the model was trained for)")
    # the files
    parser.add_argument("--format", choices=FORMATS, default="jpg", help="default: jpg")
    parser.add_argument("--quality", type=int, default=90, help="of jpg and webp, 1 to 100")
    parser.add_argument("--no_metadata", action="store_true", help="leave the recipe out of the pictures")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures made with other options")
    # speed
    parser.add_argument("--batch_size", type=int, default=8, help="pictures at once; halved when memory runs out")
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], help="default: fp16 on a GPU, fp32 on the CPU")
    parser.add_argument("--compile", action="store_true", help="compile the UNet: minutes at first, faster afterwards")
    parser.add_argument("--device", help="default: this process's GPU, else the CPU")
    ranks.add_arguments(parser)
    return parser.parse_args(argv)


def main(args):
    rank, world_size = ranks.rank_and_world_size(args)
    check_options(args)
    pictures = plan(args, prompts.read(args.prompts))
    folder = Path(args.folder)

    # See what is there, and refuse to mix it with pictures of another recipe.
    record = begin_folder(args, pictures, folder)
    todo = missing(pictures[rank::world_size], folder)

    # Generate the missing pictures of this rank.
    if todo:
        pipe = load_pipeline(args)
        if rank == 0:
            warn_of_long_prompts(pipe.tokenizer, pictures)
        generate_files(args, pipe, todo, folder)

    # The rank that finds every picture there finishes the folder.
    if others := missing(pictures, folder):
        print(f"{folder}: {len(others)} of {len(pictures)} pictures are still to be made by other processes")
        return
    finish_folder(args, pictures, folder, record)
    if todo or rank == 0:
        print(f"{len(pictures)} pictures in {folder} ({len(todo)} of them made now by this process)")


# --- the folder ---


def check_options(args):
    """Raise UserError for a number that makes no sense, before anything is loaded or written."""
    for name in ("images_per_prompt", "num_inference_steps", "batch_size", "height", "width"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: should be at least 1")
    if not 1 <= args.quality <= 100:
        raise UserError(f"--quality {args.quality}: should be 1 to 100")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed}: should be 0 to 2**63 - 1")


def plan(args, texts: list[str]) -> list[Picture]:
    """Return the pictures of all prompts, in the order of their numbers."""
    repeated = [text for text in texts for _ in range(args.images_per_prompt)]
    return [Picture(f"{k}.{args.format}", text, args.seed + k) for k, text in enumerate(repeated)]


def begin_folder(args, pictures: list[Picture], folder: Path) -> dict:
    """Record the recipe, or go on with pictures of the same; `--overwrite` removes those of another. Return the record."""
    free = ("batch_size", "device", "folder", "overwrite", "rank", "world_size", "compile", "prompts")
    settings = {key: value for key, value in vars(args).items() if key not in free}
    settings["precision"] = pipeline.pick_precision(args.precision, args.device)
    digest = hashlib.sha256(json.dumps([picture.prompt for picture in pictures]).encode()).hexdigest()
    settings["prompts"] = f"{len(pictures) // args.images_per_prompt}, SHA-256 {digest[:16]}"
    if args.unet_weight:
        from utils import lora

        settings["unet_weight"] = runs.sha256(lora.find(args.unet_weight))
    folder.mkdir(parents=True, exist_ok=True)
    # Listed before the record is read: what another rank draws under a new record is not among them.
    old = [path for path in folder.iterdir() if path.stem.isdigit() and path.suffix[1:] in FORMATS]
    record = folder / "run.json"
    if record.exists() or not old:
        try:
            # Without a picture there is nothing to mix with, such as after a mistyped option.
            return runs.begin(record, settings, overwrite=not old)
        except UserError:
            if not args.overwrite:
                raise
    elif not args.overwrite:
        raise UserError(
            f"{folder}: holds pictures, but no run.json that says how they were made; use --overwrite or another place"
        )
    for path in [*old, folder / "meta.json"]:
        path.unlink(missing_ok=True)
    return runs.begin(record, settings, overwrite=True)


def missing(pictures: list[Picture], folder: Path) -> list[Picture]:
    """Return the pictures that are not in the folder."""
    there = set(os.listdir(folder))
    return [picture for picture in pictures if picture.name not in there]


def finish_folder(args, pictures: list[Picture], folder: Path, record: dict):
    """Write meta.json, and remove what killed processes left."""
    rows = [{"file_name": name, "caption": prompt, "seed": seed} for name, prompt, seed in pictures]
    if args.safety_checker:
        flag(rows, folder)
    write_whole(folder / "meta.json", json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
    remove_leftovers(folder)
    if "finished" not in record:
        runs.finish(folder / "run.json", record, pictures=len(pictures))


def remove_leftovers(folder: Path):
    """Remove the unfinished files of this machine's dead processes, and of any machine's after an hour."""
    for path in folder.glob(".*.tmp"):  # .NAME.MACHINE.PROCESS.tmp, see write_whole
        owner, _, process = path.name.removesuffix(".tmp").rpartition(".")
        here = owner.endswith(f".{os.uname().nodename}") and process.isdigit()
        with contextlib.suppress(FileNotFoundError):
            if (here and not Path(f"/proc/{process}").exists()) or time.time() - path.stat().st_mtime > 3600:
                path.unlink()


def flag(rows: list[dict], folder: Path):
    """Mark the black pictures in the rows; that a picture is black is all that a killed run leaves of the checker's word."""
    from PIL import Image

    for row in rows:
        with Image.open(folder / row["file_name"]) as image:
            row["flagged"] = all(high == 0 for _, high in image.convert("RGB").getextrema())
    flagged = [row["file_name"] for row in rows if row["flagged"]]
    print(f"safety checker: {len(flagged)} of {len(rows)} pictures are black {', '.join(flagged[:5])}".rstrip())


# --- the model ---


def load_pipeline(args):
    """Return the pipeline with the LoRA fused into its UNet, which is then as fast as without one."""
    from utils import lora

    pipe = pipeline.load(args.pretrained_model_name_or_path, args.scheduler, args.safety_checker)
    for name in ("height", "width"):
        if (getattr(args, name) or 0) % pipe.vae_scale_factor:
            raise UserError(f"--{name} {getattr(args, name)}: should be a multiple of {pipe.vae_scale_factor}")
    if args.num_inference_steps > pipe.scheduler.config.num_train_timesteps:
        raise UserError(
            f"--num_inference_steps {args.num_inference_steps}: the model has {pipe.scheduler.config.num_train_timesteps}"
        )
    if args.unet_weight:
        lora.fuse(pipe.unet, lora.read(args.unet_weight), args.lora_scale)
    return pipeline.place(pipe, args.device, args.precision, args.compile)


def height_and_width(args, pipe) -> tuple[int, int]:
    """Return the pictures' height and width in pixels."""
    return args.height or pipeline.side(pipe), args.width or pipeline.side(pipe)


def warn_of_long_prompts(tokenizer, pictures: list[Picture]):
    """Count and report the prompts of which the text encoder reads the beginning only."""
    texts = list(dict.fromkeys(picture.prompt for picture in pictures))
    lengths = [len(ids) for ids in tokenizer(texts, verbose=False).input_ids]
    long = [text for text, length in zip(texts, lengths, strict=True) if length > tokenizer.model_max_length]
    if long:
        print(
            f"warning: {len(long)} of {len(texts)} prompts are longer than the {tokenizer.model_max_length} tokens that "
            f"the text encoder reads, and are cut off there, such as {long[0][:60]!r}"
        )


# --- the pictures ---


def generate_files(args, pipe, pictures: list[Picture], folder: Path):
    """Draw the pictures and write them to the folder, in batches that are halved when memory runs out."""
    from accelerate.utils import find_executable_batch_size

    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    bar = tqdm(total=len(pictures), desc=folder.name, unit="image", disable=local_rank > 0)
    size = args.batch_size

    def halve() -> int:
        nonlocal size
        size //= 2
        if not size:
            raise UserError("not enough memory to draw a single picture")
        tqdm.write(f"warning: memory ran out; going on with {size} pictures at once")
        return size

    @find_executable_batch_size(starting_batch_size=size, reduce_batch_size_fn=halve)
    def run(batch_size: int):
        left = missing(pictures, folder)
        bar.update(len(pictures) - len(left) - bar.n)
        generate_batches(args, pipe, left, batch_size, folder, bar)

    with bar:
        run()


def generate_batches(args, pipe, pictures: list[Picture], batch_size: int, folder: Path, bar):
    """Draw batch after batch; threads encode and write a batch while the next one is drawn."""
    import torch

    from utils import sampling

    torch.backends.cudnn.benchmark = True  # all batches have one shape: a GPU's fastest kernel is worth looking for
    negative_embeds, (height, width) = sampling.encode(pipe, [args.negative_prompt]), height_and_width(args, pipe)
    describe = recipe_writer(args, pipe)
    writing = []

    def written():
        for future in writing:
            future.result()
        bar.update(len(writing))
        writing.clear()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(pictures), batch_size):
            batch = pictures[start : start + batch_size]
            # A compiled UNet knows one batch size: the last batch is filled up, and the surplus dropped.
            filled = batch + batch[-1:] * (batch_size - len(batch)) if args.compile else batch
            texts, seeds = [picture.prompt for picture in filled], [picture.seed for picture in filled]
            drawn = sampling.draw(
                pipe, texts, seeds, negative_embeds, args.num_inference_steps, args.guidance_scale, height, width
            )
            pixels, ready = fetch(drawn)
            written()
            writing += [
                pool.submit(write_picture, folder / picture.name, array, ready, describe(picture), args)
                for picture, array in zip(batch, pixels.numpy(), strict=False)
            ]
        written()


def fetch(pixels):
    """Start copying a tensor to the CPU; return the copy, and a function that waits until it is there."""
    import torch

    copy = pixels.to("cpu", non_blocking=True)
    if pixels.device.type != "cuda":
        return copy, lambda: None
    event = torch.cuda.Event(blocking=True)  # the threads that wait leave the processors alone
    event.record(torch.cuda.current_stream(pixels.device))
    return copy, event.synchronize


def write_picture(path: Path, array, ready, text: str | None, args):
    """Encode a picture with its recipe and write it."""
    from PIL import Image

    ready()
    kind, encoded = FORMATS[args.format], io.BytesIO()
    options = recipe.save_options(text, kind) if text else {}
    Image.fromarray(array).save(encoded, kind, quality=args.quality, **options)
    write_whole(path, encoded.getvalue())


def recipe_writer(args, pipe):
    """Return a function from a picture to its recipe, or to None with --no_metadata."""
    if args.no_metadata:
        return lambda picture: None
    height, width = height_and_width(args, pipe)
    fields = {
        "Steps": args.num_inference_steps,
        "Sampler": pipeline.SCHEDULERS[args.scheduler][2],
        "CFG scale": args.guidance_scale,
        "Seed": None,
        "Size": f"{width}x{height}",
        "Model": Path(args.pretrained_model_name_or_path).name,
        "RNG": "CPU",
    }
    if args.unet_weight:
        from utils import lora

        file = lora.find(args.unet_weight)
        fields["Lora hashes"] = f"{file.stem}: {recipe.lora_hash(file)}"
        fields["LoRA scale"] = args.lora_scale
    return lambda picture: recipe.text(picture.prompt, args.negative_prompt, {**fields, "Seed": picture.seed})


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
