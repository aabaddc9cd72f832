"""train_lora.py in fresh processes, one or several that average their gradients, started in a second from a server that has imported it."""

import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["processes", "train_lora"])


def start(processes: int, argv: list[str], folder: Path) -> list:
    """Start the processes as torchrun would; FOLDER/{rank}.txt gets what they print, FOLDER/gradients-{rank}-{step}.pt each step's."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [SERVER.Process(target=rank, args=(i, processes, port, argv, folder)) for i in range(processes)]
    for process in started:
        process.start()
    return started


def finish(started: list, folder: Path) -> str:
    """Wait for the processes; return what they printed, or fail with it."""
    for process in started:
        process.join(120)
    said = "".join((folder / f"{i}.txt").read_text() for i in range(len(started)))
    assert all(process.exitcode == 0 for process in started), said[-3000:]
    return said


def run(processes: int, argv: list[str], folder: Path) -> str:
    return finish(start(processes, argv, folder), folder)


def kill(started: list, seconds: float):
    """Kill -9 all of them after a while."""
    time.sleep(seconds)
    for process in started:
        process.kill()
    for process in started:
        process.join()


def rank(number: int, processes: int, port: int, argv: list[str], folder: Path):
    if processes > 1:
        where = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in where.items()}, MASTER_ADDR="127.0.0.1")
    multiprocessing.set_start_method("fork", force=True)  # of workers: those of a server would outlive a killed rank
    sys.stdout = sys.stderr = open(folder / f"{number}.txt", "w", buffering=1)
    import torch

    import train_lora
    from utils.errors import one_line_errors

    torch.set_num_threads(1)
    torch.optim.AdamW.step = spy(torch.optim.AdamW.step, folder, number)
    with one_line_errors():
        train_lora.main(train_lora.parse_args(argv))


def spy(step, folder: Path, number: int):
    """Return AdamW's step, which first writes down the gradients."""
    import torch

    done = 0

    def noted(self, *args, **kwargs):
        nonlocal done
        done += 1
        gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        torch.save(gradients, folder / f"gradients-{number}-{done}.pt")
        return step(self, *args, **kwargs)

    return noted
