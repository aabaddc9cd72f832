"""How long select_training_images.py thinks before it saves the first image, and in how much memory.

    python -m benchmarks.selection                      # a million rows, beside a plain loop
    python -m benchmarks.selection --rows 14000000      # all of DiffusionDB-large, ours alone: 4 GB of disk

plain   json.loads for every line, a dictionary of prompts, a softmax a prompt
ours    select_training_images.py --dry_run: the same, and repeated rows and pictures found

Rows are generated as process_diffusiondb.py writes them, one to twelve images a prompt.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from pathlib import Path

import numpy as np

import select_training_images as stage
from benchmarks import tables

PROMPT = "a portrait of the red castle by the blue forest in a storm, detailed oil painting, city light, robot cat art"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    return parser.parse_args()


def main(args):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        meta = Path(folder, "meta.jsonl")
        tables.apart(generate, meta, args.rows)
        for what, function in (("plain: a dictionary", plain), ("ours", ours)):
            if function is plain and args.rows > 2_000_000:
                continue
            seconds, peak = tables.apart(function, meta)
            rows.append({"what": f"{what}, {seconds:.1f} s", "speed": args.rows / seconds, "peak_gib": peak})
    tables.report(f"selection_{args.rows // 1_000_000}m", rows, "rows/s", total=args.rows)


def generate(path: Path, count: int):
    rng = np.random.default_rng(0)
    words, written, position, part = PROMPT.split(), 0, 0, 2
    with open(path, "w") as file:
        while written < count:
            prompt = " ".join(words[i] for i in rng.integers(0, len(words), rng.integers(10, 40)))
            for score in rng.normal(20, 1, min(rng.integers(1, 13), count - written)).round(4).tolist():
                name = rng.bytes(24).hex()
                row = f'{{"id": {part * 1_000_000 + position}, "prompt": "{prompt}", "score": {score}, '
                row += f'"blurry": {"true" if name[0] == "0" else "false"}, "part": {part}, '
                file.write(row + f'"image": "{name[:32]}.webp", "pixels": "{name[32:]}"}}\n')
                written, position = written + 1, position + 1
                if position == 1000:
                    part, position = part + 1, 0


def plain(path: Path) -> float:
    """Return the seconds of a plain loop."""
    start = time.perf_counter()
    prompts = {}
    with open(path) as file:
        for line in file:
            row = json.loads(line)
            if not row["blurry"]:
                prompts.setdefault(row["prompt"], []).append(row)
    chosen = []
    for rows in prompts.values():
        if len(rows) >= 4:
            for sign in (1, -1):
                scores = sign * np.array([row["score"] for row in rows])
                p = np.exp(scores - scores.max())
                p /= p.sum()
                if p.max() > 2 / len(rows):
                    chosen.append((rows[p.argmax()], sign))
    assert chosen
    return time.perf_counter() - start


def ours(path: Path) -> float:
    """Return the seconds of the stage."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        stage.main(stage.parse_args(["--meta_file", str(path), "--dry_run"]))
    return time.perf_counter() - start


if __name__ == "__main__":
    main(parse_args())
