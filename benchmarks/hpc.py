"""Training steps of the classifier at full size, ViT-L/14 with random weights: what freezing the lower blocks saves.

    python -m benchmarks.hpc                # on a CPU one prompt a step and two steps, on a GPU five prompts and 50 steps

plain    the same step written plainly: every parameter trains, pictures decoded in the loop
ours     train_hpc.py itself, its own images/s after the first steps; pictures of 512 x 512 decoded by its workers
limit    the towers alone: forward and backward of what trains, on pixels that are there already, no optimizer

Steps have prompts of 4 pictures; on a GPU all in bf16 autocast with fp32 weights, on a CPU in fp32.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_hpc
from benchmarks import tables
from utils import hps

MODEL = "ViT-L-14-quickgelu"


def parse_args(argv=None):
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=5 if gpu else 1, help="a step")
    parser.add_argument("--steps", type=int, default=50 if gpu else 2)
    parser.add_argument("--warmup", type=int, default=10 if gpu else 1, help="steps before the clock starts")
    return parser.parse_args(argv)


def main(args):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_inputs(folder, args)
        rows = tables.measure(
            ("plain: everything trains", plain, str(folder), args),
            ("ours: train_hpc.py", ours, str(folder), args),
            ("ours, --gradient_checkpointing", ours, str(folder), args, "--gradient_checkpointing"),
            ("limit: towers alone, forward and backward", limit, str(folder), args),
        )
    tables.report("hpc", rows, model=MODEL, prompts=args.prompts, steps=args.steps)


def make_inputs(folder: Path, args):
    """Write random weights and a data set of pictures of noise, smooth as photographs are."""
    torch.manual_seed(0)
    torch.save(open_clip.create_model(MODEL, pretrained=None).state_dict(), folder / "clip.pt")
    rng = np.random.default_rng(0)
    (folder / "preference_images").mkdir()
    for i in range(4):
        noise = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        noise.resize((512, 512), Image.Resampling.BICUBIC).save(folder / "preference_images" / f"{i}.jpg", quality=90)
    row = {"prompt": "a castle above the sea, oil painting", "file_path": [f"{i}.jpg" for i in range(4)]}
    for split, count in (("train", args.prompts * (args.warmup + args.steps)), ("test", 1)):
        rows = [row | {"id": i, "human_preference": i % 4} for i in range(count)]
        (folder / f"preference_{split}.json").write_text(json.dumps(rows))


def ours(folder: str, args, *options) -> float:
    """Return images/s of train_hpc.py as it logs them, over the windows after the warm-up."""
    with tempfile.TemporaryDirectory() as place:
        arguments = ["--dataset_folder", folder, "--output", f"{place}/hpc.pth", "--pretrained", f"{folder}/clip.pt"]
        arguments += ["--batch_size", args.prompts, "--logging_steps", args.warmup, "--checkpointing_steps", 10**9]
        if torch.cuda.is_available():
            arguments += ["--mixed_precision", "bf16"]
        train_hpc.main(train_hpc.parse_args([str(argument) for argument in (*arguments, *options)]))
        events = EventAccumulator(str(next(Path(f"{place}/hpc.pth.logs").rglob("events.*")).parent)).Reload()
        speeds = [event.value for event in events.Scalars("images_per_second")][1:]
    return float(1 / np.mean(1 / np.array(speeds)))


def load(folder: str):
    """Return the scorer, its device, and a context of the precision."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scorer = hps.load(model=MODEL, pretrained=f"{folder}/clip.pt", device=device)
    return scorer, device, torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def plain(folder: str, args) -> float:
    scorer, device, autocast = load(folder)
    model, rows = scorer.model, json.loads(Path(folder, "preference_train.json").read_text())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.7e-5, weight_decay=3.1e-3)
    for step in range(args.warmup + args.steps):
        if step == args.warmup:
            tables.synchronize(device)
            started = time.perf_counter()
        losses = []
        batch = rows[step * args.prompts :][: args.prompts]
        images = [Image.open(Path(folder, "preference_images", name)) for row in batch for name in row["file_path"]]
        pixels = torch.stack([scorer.preprocess(image) for image in images]).to(device)
        with autocast:
            image, text, scale = model(pixels, scorer.tokenizer([row["prompt"] for row in batch]).to(device))
        for row, features, prompt in zip(batch, image.float().split(4), text.float(), strict=True):
            target = torch.tensor(row["human_preference"], device=device)
            losses.append(F.cross_entropy(scale * features @ prompt, target))
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    tables.synchronize(device)
    return 4 * args.prompts * args.steps / (time.perf_counter() - started)


def limit(folder: str, args) -> float:
    scorer, device, autocast = load(folder)
    train_hpc.unlock(scorer.model, 10, 6)
    pixels = torch.randn(4 * args.prompts, 3, 224, 224, device=device)
    tokens = scorer.tokenizer(["a castle above the sea, oil painting"] * args.prompts).to(device)

    def step():
        with autocast:
            image, text, _ = scorer.model(pixels, tokens)
        (image.sum() + text.sum()).backward()
        scorer.model.zero_grad()

    repeats = 1 if device == "cpu" else 3
    per_run = args.steps if device == "cuda" else 1
    return 4 * args.prompts * per_run / tables.seconds(lambda: [step() for _ in range(per_run)], repeats, device)


if __name__ == "__main__":
    main(parse_args())
