"""Generate with processes that are killed at random moments, then let three ranks finish, and two whole runs meet in one folder.

    python tests/kill_generation.py KILLS SEED FOLDER OPTIONS OF generate_images.py...

Writes FOLDER/killed and FOLDER/shared. The processes are forks of one that has the imports behind it, so that a start is quick.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from accelerate.utils import find_executable_batch_size  # noqa: F401
from diffusers import PNDMScheduler, StableDiffusionPipeline  # noqa: F401
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

import generate_images
from utils.errors import one_line_errors


def start(options, folder, environment=None) -> int:
    """Start generate_images.py in a fork, with what a launcher puts into the environment; return its process id."""
    if process := os.fork():
        return process
    try:
        os.environ.update(environment or {})
        with one_line_errors():
            generate_images.main(generate_images.parse_args([*options, "--folder", str(folder)]))
        os._exit(0)
    finally:
        os._exit(1)


def ranks(world_size: int, launcher: str = "torchrun") -> list[dict]:
    names = ("RANK", "WORLD_SIZE") if launcher == "torchrun" else ("SLURM_PROCID", "SLURM_NTASKS")
    return [dict(zip(names, (str(rank), str(world_size)), strict=True)) for rank in range(world_size)]


def drawn(folder: Path) -> int:
    return len([path for path in folder.glob("*.*") if path.stem.isdigit()])


def main(kills: int, seed: int, folder: Path, options: list[str]):
    rng = random.Random(seed)
    killed = folder / "killed"
    for _ in range(kills):
        # Some die while they start, the others after so many more pictures, in the middle of something.
        enough = drawn(killed) + rng.randrange(3)
        latest = time.monotonic() + (rng.random() if rng.random() < 0.2 else 10)
        batch = ["--batch_size", str(rng.randint(1, 4))]
        processes = [start([*options, *batch], killed, rank) for rank in ranks(rng.randint(1, 3))]
        while drawn(killed) <= enough and time.monotonic() < latest:
            time.sleep(0.002)
        time.sleep(0.05 * rng.random())
        for process in processes:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        print("killed at", drawn(killed), "pictures,", len(list(killed.glob(".*.tmp"))), "unfinished files", flush=True)
    together = [start(options, killed, rank) for rank in ranks(3, "SLURM")]
    together += [start(options, folder / "shared") for _ in range(2)]
    sys.exit(any(os.waitpid(process, 0)[1] for process in together))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
