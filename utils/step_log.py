"""The log of a training: a row a step in log.jsonl and in the trackers, each step once, also when a killed run goes on."""

import math
import resource
import time
from pathlib import Path

import torch

from utils.errors import UserError
from utils.jsonl import Appender, dumps, read, write_whole
from utils.training_pictures import KINDS


class StepLog:
    """Loss (also of each kind of picture), learning rate, gradient norm, images/s and memory of every step.

    The numbers stay on the device until `write`, so that no step waits for the GPU.
    """

    def __init__(self, output: Path, step: int, global_batch: int, args, accelerator, record: dict):
        self.path, self.global_batch, self.accelerator = output / "log.jsonl", global_batch, accelerator
        self.steps, self.values, self.rates = [], [], []
        if accelerator.is_main_process:
            # The steps after the checkpoint are trained again, and logged again.
            rows = read(self.path) if self.path.exists() else ()
            write_whole(self.path, "".join(dumps(row) for row in rows if row["step"] <= step))
            for picture in (output / "validation").glob("step-*.png"):
                if int(picture.stem.split("-")[1]) > step:
                    picture.unlink()
            if args.report_to != "none":
                name = f"{output.name}-{record['started']}".replace(" ", "-").replace(":", "-")
                options = {"tensorboard": {"purge_step": step + 1}, "wandb": {"id": name, "resume": "allow"}}
                accelerator.init_trackers("train_lora", {k: v for k, v in vars(args).items() if v is not None}, options)
        self.restart_clock()

    def add(self, step: int, sums: torch.Tensor, gradient_norm: torch.Tensor, rate: float):
        """Keep a step: `sums` holds this process's losses and counts of each kind of picture, (2, 3)."""
        self.steps.append(step)
        self.rates.append(rate)
        self.values.append(torch.cat([sums.flatten(), gradient_norm.detach().reshape(1)]))

    def write(self, bar):
        """Write the steps kept so far; UserError if the loss is no number any more."""
        if not self.steps:
            return
        # The gradients are averaged already: every process has the same norm.
        values = self.accelerator.reduce(torch.stack(self.values), "sum").tolist()
        elapsed = time.perf_counter() - self.clock
        speed = len(self.steps) * self.global_batch / elapsed
        rows = []
        for step, rate, (*sums, norm) in zip(self.steps, self.rates, values, strict=True):
            losses, counts = sums[:3], sums[3:]
            row = {"step": step, "loss": sum(losses) / sum(counts)}
            row |= {f"loss/{kind}": losses[i] / counts[i] for i, kind in enumerate(KINDS) if counts[i]}
            norm /= self.accelerator.num_processes
            # In half precision a step whose gradients overflow is left out, and has no norm.
            row |= {"lr": rate, "gradient_norm": norm if math.isfinite(norm) else None}
            rows.append(row | {"images_per_second": round(speed, 3), "memory_gib": round(peak_memory(), 3)})
            if not math.isfinite(row["loss"]):
                raise UserError(
                    f"the loss of step {step} is {row['loss']}; the latest checkpoint is from before it: "
                    "go on with bf16 or no mixed precision, or start anew with a lower --learning_rate"
                )
        if self.accelerator.is_main_process:
            with Appender(self.path) as file:
                for row in rows:
                    file.write(row)
            for row in rows:
                shown = {key: value for key, value in row.items() if key != "step" and value is not None}
                self.accelerator.log(shown, step=row["step"])
        bar.set_postfix(loss=f"{rows[-1]['loss']:.4f}", images_per_s=f"{speed:.1f}", refresh=False)
        self.steps, self.values, self.rates = [], [], []
        self.restart_clock()

    def restart_clock(self):
        """Begin to time steps, after something that is none."""
        self.clock = time.perf_counter()

    def seconds(self) -> float:
        """Return what all steps took, also those before an interruption."""
        return round(sum(self.global_batch / row["images_per_second"] for row in read(self.path)), 1)


def peak_memory() -> float:
    """Return the peak of the GPU's memory as torch allocated it, or of this process's resident memory, in GiB."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
