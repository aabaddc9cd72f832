"""Whether process_diffusiondb.py's memory and time a row stay the same over a million rows.

    python -m benchmarks.annotation_scale

Everything is real but the decoding of pictures and CLIP's two towers, which are replaced by stubs: the zip of 1,000 members
(linked under 1,000 names), its list, the batches, the rows, their files and the last merge. Prints the rows a second and
the resident memory after each tenth, and as a table the last tenth beside the first.
"""

import argparse
import json
import tempfile
import time
import zipfile
from itertools import pairwise
from pathlib import Path

import torch

import process_diffusiondb as stage
from benchmarks import tables
from utils import diffusiondb

TENTHS = 10


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=1000, help="of 1,000 rows each (default: 1000)")
    return parser.parse_args()


def main(args):
    speeds, resident = tables.apart(run, args.parts)[0]
    for i, (speed, memory) in enumerate(zip(speeds, resident, strict=True), 1):
        print(f"{i * args.parts * 1000 // TENTHS:12,} rows{speed:12,.0f} rows/s{memory:10.3f} GiB")
    rows = [
        {"what": "the last tenth of the rows", "speed": speeds[-1], "peak_gib": resident[-1]},
        {"what": "the second tenth", "speed": speeds[1], "peak_gib": resident[1]},
    ]
    tables.report("annotation_scale", rows, "rows/s", total=args.parts * 1000)


class Scorer:
    """Stands in for CLIP: one vector for every picture and prompt."""

    device = torch.device("cpu")

    def preprocess(self, image):
        raise NotImplementedError

    def encode_images(self, pixels):
        return torch.ones(len(pixels), 8)

    def encode_prompts(self, prompts):
        return torch.ones(len(prompts), 8)


class Pictures(stage.Pictures):
    def __getitem__(self, batch):
        if isinstance(batch, stage.Done):
            return batch
        return [(row, False, "0" * 16) for row in batch[2]], torch.zeros(len(batch[2]), 1), []


def run(parts: int) -> tuple[list[float], list[float]]:
    """Return the rows a second in each tenth of the run, and the resident memory at its end in GiB."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        source.mkdir()
        with zipfile.ZipFile(Path(folder, "part.zip"), "w") as archive:
            index = {f"{i:032x}.webp": {"p": f"a long prompt of many words, number {i // 4} " * 3} for i in range(1000)}
            archive.writestr("part.json", json.dumps(index))
            for name in index:
                archive.writestr(name, b"")
        for number in range(parts):
            (source / f"part-{number + 1:06d}.zip").symlink_to(Path(folder, "part.zip"))
        args = stage.parse_args(["--clip_checkpoint", "", "--meta_file", f"{folder}/meta.jsonl", "--num_workers", "0"])
        Path(f"{args.meta_file}.parts").mkdir()

        marks = [(time.perf_counter(), resident())]
        finish_part, done = stage.finish_part, 0

        def finish_and_mark(*arguments):
            nonlocal done
            finish_part(*arguments)
            done += 1
            if done % (parts // TENTHS) == 0:
                marks.append((time.perf_counter(), resident()))

        stage.finish_part, stage.Pictures = finish_and_mark, Pictures
        found = diffusiondb.find_parts(str(source))
        stage.score_parts(found, Scorer(), args, rank=1)
        assert stage.merge(args, found)["images"] == parts * 1000
    tenth = parts * 1000 / TENTHS
    speeds = [tenth / (b[0] - a[0]) for a, b in pairwise(marks)]
    return speeds, [memory for _, memory in marks[1:]]


def resident() -> float:
    """Return this process's resident memory in GiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**30


if __name__ == "__main__":
    main(parse_args())
