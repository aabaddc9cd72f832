"""Pictures that show how a training goes: the same prompts and seeds each time, plain, with the prefix, and with it as negative prompt."""

import io
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image

from utils import hps
from utils.errors import UserError
from utils.jsonl import dumps, read, write_whole
from utils.main_process import on_main


def read_validation_prompts(path: str | None) -> list[str]:
    """Return the lines of the file that are not empty."""
    if not path:
        return []
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; write a prompt a line into it (echo 'your prompt' >> {path})")
    return [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def validate(pipe, prompts: list[str], step: int, output: Path, args, accelerator) -> bool:
    """Draw, score and log the pictures of this step if they are due and not there yet; return whether they were drawn.

    Picture i starts from the noise of seed + i on every device, and the processes share the pictures out.
    """
    due = step % args.validation_iters == 0 or step == args.max_train_steps
    grid = output / "validation" / f"step-{step:06d}.png"
    if not prompts or not due or on_main(accelerator, grid.exists):
        return False
    repeated = [prompt for prompt in prompts for _ in range(args.num_validation_images)]
    ways = {
        "plain": (repeated, ""),
        "prefixed": ([args.negative_prefix + prompt for prompt in repeated], ""),
        "negative_prompt": (repeated, args.negative_prefix),
    }
    pipe.unet.eval()
    mine = range(accelerator.process_index, len(repeated), accelerator.num_processes)
    drawn = [picture for way in ways for picture in draw(pipe, way, *ways[way], mine, args, accelerator)]
    pipe.unet.train()
    drawn = gather_object(drawn)
    if accelerator.is_main_process:
        pictures = {(way, i): pixels for way, i, pixels in drawn}
        bands = {way: [pictures[way, i] for i in range(len(repeated))] for way in ways}
        log_pictures(bands, ways, step, accelerator)
        grid.parent.mkdir(exist_ok=True)
        if args.hpc:
            log_scores(bands, repeated, step, grid.parent / "hps.jsonl", args, accelerator)
        content = io.BytesIO()
        Image.fromarray(np.concatenate([np.concatenate(band, axis=1) for band in bands.values()])).save(content, "PNG")
        write_whole(grid, content.getvalue())
    accelerator.wait_for_everyone()
    return True


@torch.no_grad()
def draw(pipe, way: str, prompts: list[str], negative: str, indices, args, accelerator) -> list[tuple]:
    """Return (way, i, pixels uint8 (h, w, 3)) for the prompts of these indices."""
    pipe = partial(
        pipe, num_inference_steps=args.validation_inference_steps, guidance_scale=args.validation_guidance_scale,
        height=args.resolution, width=args.resolution,
    )  # fmt: skip
    found = []
    for start in range(0, len(indices), args.train_batch_size):
        batch = indices[start : start + args.train_batch_size]
        generators = [torch.Generator().manual_seed(args.seed + i) for i in batch]
        # Never compiled: that would take minutes for few pictures, and the place of the training's graphs.
        with accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            images = pipe(
                [prompts[i] for i in batch], negative_prompt=[negative] * len(batch), generator=generators
            ).images
        found += [(way, i, np.asarray(image)) for i, image in zip(batch, images, strict=True)]
    return found


def log_pictures(bands: dict[str, list[np.ndarray]], ways: dict, step: int, accelerator):
    """Send the pictures to the trackers that show any."""
    for tracker in accelerator.trackers:
        for way, band in bands.items():
            if tracker.name == "tensorboard":
                tracker.writer.add_images(way, np.stack(band), step, dataformats="NHWC")
            if tracker.name == "wandb":
                import wandb

                shown = [wandb.Image(image, caption=text) for image, text in zip(band, ways[way][0], strict=True)]
                tracker.log({way: shown}, step=step)


def log_scores(bands: dict[str, list[np.ndarray]], prompts: list[str], step: int, path: Path, args, accelerator):
    """Log the mean HPS of each way with the bare prompts. It works when "negative_prompt" climbs and "prefixed" falls."""
    # Loaded anew each time: between validations the memory belongs to the training.
    classifier = hps.load(args.hpc, device=accelerator.device)
    scores = {
        f"hps/{way}": float(classifier.score([Image.fromarray(image) for image in band], prompts).mean())
        for way, band in bands.items()
    }
    accelerator.log(scores, step=step)
    rows = [row for row in read(path) if row["step"] < step] if path.exists() else []
    write_whole(path, "".join(map(dumps, [*rows, {"step": step, **scores}])))
