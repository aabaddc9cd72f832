"""Fine-tune CLIP on human choices into the Human Preference Classifier (HPC).

    bash scripts/train_hpc.sh                                           # the paper's recipe, on all GPUs of this machine
    python train_hpc.py --dataset_folder dataset --output hpc.pth
    accelerate launch train_hpc.py --dataset_folder dataset --output hpc.pth

Reads   DATASET_FOLDER/preference_{train,test}.json and preference_images/ (the released format; "Human preference dataset"
        in the README)
Writes  OUTPUT: {"state_dict": OpenAI CLIP's names, "model", "resize", "options", "test_accuracy", ...}, which every scoring
        stage reads; STEM.best.pth, the same of the step that did best on the test split, if that was measured more than
        once (it was chosen on that split, so what is measured there flatters it); OUTPUT.run.json, OUTPUT.errors.jsonl
        (dropped prompts), OUTPUT.logs/ (trackers) and, while it runs, OUTPUT.checkpoint (a rerun goes on there)

People saw the n images of one prompt and chose one. The classifier's probability for image i is a softmax within the
prompt (paper, section 4), and the loss is its cross-entropy with the choice, averaged over the prompts of a step:

    p_i = exp(s * cos(image_i, prompt)) / sum_j exp(s * cos(image_j, prompt))        loss = -log p_chosen

The last blocks of both towers train, and what comes after them: final norms, projections and the logit scale s. By
default nothing is augmented, as in the release. A step's prompts are dealt out to the processes, so how many there are
does not change the result beyond rounding.
"""

import argparse
import hashlib
import importlib.util
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils import hps, preferences, runs
from utils.errors import UserError, one_line_errors
from utils.jsonl import dumps, write_whole
from utils.prompt_batches import PromptBatches


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_folder", default="dataset", help="default: dataset")
    parser.add_argument("--output", default="hpc.pth", help="default: hpc.pth")
    # Model.
    parser.add_argument("--model", default="ViT-L-14-quickgelu", help="open_clip name, or path of a JSON config")
    parser.add_argument("--pretrained", default="openai", help="open_clip tag, or path of the weights")
    parser.add_argument("--unlocked_image_layers", type=int, default=10, help="last image blocks that train (10)")
    parser.add_argument("--unlocked_text_layers", type=int, default=6, help="last text blocks that train (6)")
    parser.add_argument(
        "--resize", choices=hps.RESIZES, default="crop",
        help="crop: CLIP's own, as released; pad: longest side, zero-padded, as the paper says; kept in the checkpoint",
    )  # fmt: skip
    # Optimisation: the paper's recipe.
    parser.add_argument("--learning_rate", type=float, default=1.7e-5)
    parser.add_argument("--weight_decay", type=float, default=3.1e-3, help="of matrices; none on norms and biases")
    parser.add_argument("--batch_size", type=int, default=5, help="prompts a step, over all processes (5)")
    parser.add_argument("--num_train_epochs", type=int, default=1)
    parser.add_argument("--warmup_steps", type=int, default=0)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: accelerate's configuration")
    parser.add_argument("--random_flip", action="store_true", help="mirror half of the pictures; not in the release")
    parser.add_argument("--seed", type=int, default=42)
    # Memory: the same result, beyond rounding.
    parser.add_argument(
        "--micro_batch_size", type=int, help="prompts that a process takes at once, summing gradients up (default: all)"
    )
    parser.add_argument("--gradient_checkpointing", action="store_true", help="less memory, a third more time")
    # Machinery.
    parser.add_argument("--eval_steps", type=int, help="steps between tests; every epoch ends with one anyway")
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--logging_steps", type=int, default=10)
    parser.add_argument("--report_to", default="tensorboard", help="tensorboard, wandb, all or none")
    parser.add_argument("--num_workers", type=int, default=4, help="processes that decode images, a process")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU even if there is a GPU")
    parser.add_argument("--overwrite", action="store_true", help="start anew over output made with other options")
    return parser.parse_args(argv)


def main(args):
    accelerator, started = make_accelerator(args), time.time()

    # Read the choices; prompts whose pictures are not all there are dropped and logged.
    errors = []
    train_choices = read_choices(args, "train", errors, accelerator)
    test_choices = read_choices(args, "test", errors, accelerator)
    record, checkpoint_path = begin_run(args, accelerator, train_choices, test_choices, errors)
    if Path(args.output).exists():
        accelerator.print(f"{args.output} is finished; nothing to do")
        return

    # Load CLIP and unlock its upper blocks. Frozen blocks see no gradient, so autograd keeps nothing of them.
    scorer = hps.load(model=args.model, pretrained=args.pretrained, device=accelerator.device, resize=args.resize)
    unlock(scorer.model, args.unlocked_image_layers, args.unlocked_text_layers)
    if args.gradient_checkpointing:
        scorer.model.set_grad_checkpointing()
    optimizer = make_optimizer(scorer.model, args)
    step, best = load_checkpoint(checkpoint_path, scorer.model, optimizer, accelerator)
    if len(set(gather_object([step]))) > 1:
        raise UserError(f"{checkpoint_path}: the processes see different ones; run the same command again")
    model, optimizer = accelerator.prepare(scorer.model, optimizer)
    batches = PromptBatches(train_choices, scorer, args, accelerator, first_step=step)
    steps, tests = batches.steps, test_steps(args, batches)
    loader = DataLoader(
        batches, batch_size=None, num_workers=args.num_workers, pin_memory=accelerator.device.type == "cuda"
    )
    if args.report_to != "none":
        accelerator.init_trackers("train_hpc", config={k: v for k, v in vars(args).items() if v is not None})
    bar = tqdm(total=steps, initial=step, desc="train_hpc", unit="step", disable=not accelerator.is_local_main_process)
    window = Window(accelerator)

    # Train.
    for pixels, tokens, counts, chosen, weight, last in loader:
        # The gradients are summed up over the micro-batches, and over the processes once a step, with the last one.
        with nullcontext() if last else accelerator.no_sync(model):
            with accelerator.autocast():
                image_features, text_features, scale = model(
                    pixels.to(accelerator.device, non_blocking=True), tokens.to(accelerator.device, non_blocking=True)
                )
            # Cross-entropy of the choice with the softmax over the images of its prompt, prompt by prompt.
            logits = [
                scale * images.float() @ text.float()
                for images, text in zip(image_features.split(counts), text_features, strict=True)
            ]
            losses = [-F.log_softmax(x, dim=0)[choice] for x, choice in zip(logits, chosen, strict=True)]
            accelerator.backward(torch.stack(losses).sum() * weight)
        if weight:
            window.add(losses, logits, chosen)
        if not last:
            continue
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * schedule(step, steps, args.warmup_steps)
        accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        scorer.model.logit_scale.data.clamp_(0, math.log(100))  # as CLIP
        step += 1

        bar.update()
        if step % args.logging_steps == 0 or step in tests:
            logs = window.means() | {"lr": optimizer.param_groups[0]["lr"]}
            accelerator.log(logs, step=step)
            shown = {key: f"{logs[key]:.{digits}f}" for key, digits in (("loss", 3), ("images_per_second", 0))}
            bar.set_postfix(shown | {"lr": f"{logs['lr']:.1e}"}, refresh=False)
        if step in tests:
            tested = test(scorer, test_choices, args, accelerator)
            accelerator.log(tested, step=step)
            if len(tests) > 1 and tested["test_accuracy"] > best:
                best = tested["test_accuracy"]
                save_classifier(best_path(args), scorer, args, accelerator, step, tested)
            window.restart()
        if step % args.checkpointing_steps == 0 and step < steps:
            save_checkpoint(checkpoint_path, step, best, scorer.model, optimizer, accelerator)
    bar.close()

    # Write the record, then the classifier: once that is there, the run is finished.
    if accelerator.is_main_process:
        counts = {"train_prompts": len(train_choices), "test_prompts": len(test_choices)}
        counts |= {"dropped_prompts": len(errors), "steps": steps}
        results = tested | ({"best_test_accuracy": best} if len(tests) > 1 else {})
        runs.finish(f"{args.output}.run.json", record, **results, **counts, seconds=round(time.time() - started, 1))
        save_classifier(Path(args.output), scorer, args, accelerator, steps, tested)
        checkpoint_path.unlink(missing_ok=True)
        print(
            "test accuracy: {test_accuracy:.4f} (pairwise {test_pairwise_accuracy:.4f})".format(**tested)
            + f" on {len(test_choices)} prompts; dropped {len(errors)}"
            + (f", see {args.output}.errors.jsonl" if errors else "")
            + (f"; best of {len(tests)} tests: {best:.4f}, {best_path(args)}" if len(tests) > 1 else "")
        )
    accelerator.wait_for_everyone()
    accelerator.end_training()


# --- data ---


def read_choices(args, split: str, errors: list[dict], accelerator) -> list[preferences.Choice]:
    """Return the usable choices of a split; those left out are added to `errors`, on every process alike."""
    path = Path(args.dataset_folder) / f"preference_{split}.json"
    choices = preferences.read(path, errors)
    # Decode every picture once: one that is broken is found now, not in the middle of an epoch.
    mine = range(accelerator.process_index, len(choices), accelerator.num_processes)
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda i: (i, preferences.why_unusable(choices[i])), mine)
        bar = tqdm(
            found, total=len(mine), desc=f"check {split}", unit="prompt", disable=not accelerator.is_local_main_process
        )
        reasons = dict(gather_object([(i, reason) for i, reason in bar if reason]))
    errors += [{"item": choices[i].where, "stage": "read", "reason": reasons[i]} for i in sorted(reasons)]
    choices = [choice for i, choice in enumerate(choices) if i not in reasons]
    if not choices:
        raise UserError(f"{path}: no usable prompts in it; the first one: {errors[0]['item']}: {errors[0]['reason']}")
    return choices


# --- model and optimisation ---


def make_accelerator(args) -> Accelerator:
    """Return accelerate's Accelerator; UserError for options that cannot be."""
    for name, least in (
        ("batch_size", 1), ("micro_batch_size", 1), ("num_train_epochs", 1), ("eval_steps", 1), ("checkpointing_steps", 1),
        ("logging_steps", 1), ("num_workers", 0), ("warmup_steps", 0), ("unlocked_image_layers", 0), ("unlocked_text_layers", 0),
    ):  # fmt: skip
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f"--{name} should be {least} or more, not {getattr(args, name)}")
    if args.report_to not in ("tensorboard", "wandb", "all", "none"):
        raise UserError(f"--report_to should be tensorboard, wandb, all or none, not {args.report_to}")
    if args.report_to not in ("all", "none") and not importlib.util.find_spec(args.report_to):
        raise UserError(f"--report_to {args.report_to}: not installed; pip install it, or --report_to none")
    log_with = None if args.report_to == "none" else args.report_to
    try:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision, cpu=args.cpu, log_with=log_with, project_dir=f"{args.output}.logs"
        )
    except ValueError as error:  # bf16 on a GPU that has none
        raise UserError(f"--mixed_precision: {error}") from None
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU; on a CPU accelerate would ignore it")
    return accelerator


def unlock(model, image_layers: int, text_layers: int):
    """Let only the last blocks train, and what comes after them: final norms, projections and the logit scale."""
    if not hasattr(model.visual, "ln_post") or not hasattr(model, "transformer"):
        raise UserError("--model: only CLIP with a vision transformer can be trained here")
    model.requires_grad_(False)
    trained = []
    for tower, option, count in (
        (model.visual, "--unlocked_image_layers", image_layers),
        (model, "--unlocked_text_layers", text_layers),
    ):
        blocks = list(tower.transformer.resblocks)
        if count > len(blocks):
            raise UserError(f"{option} {count}: the model has only {len(blocks)} blocks there")
        trained += blocks[len(blocks) - count :]
    for module in (*trained, model.visual.ln_post, model.ln_final):
        module.requires_grad_(True)
    for parameter in (model.visual.proj, model.text_projection, model.logit_scale):
        parameter.requires_grad_(True)


def make_optimizer(model, args) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: norms, biases and the logit scale have none."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.learning_rate)


def schedule(step: int, steps: int, warmup: int) -> float:
    """Return the learning rate's factor at a step: linear warm-up, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


# --- measuring ---


def test_steps(args, batches: PromptBatches) -> set[int]:
    """Return the steps after which the test split is measured: every --eval_steps, and the end of every epoch."""
    every = [args.eval_steps] if args.eval_steps else []
    return {step for k in (batches.steps_per_epoch, *every) for step in range(k, batches.steps + 1, k)}


def test(scorer, choices, args, accelerator) -> dict[str, float]:
    """Return top-1 and pairwise accuracy: how often the chosen image scores highest, and how often above another one.

    Computed in fp32, as the stages that will use the classifier do, whatever the precision of the training.
    """
    mine = choices[accelerator.process_index :: accelerator.num_processes]
    totals = np.zeros(4)
    for choice, (scores, reason) in zip(
        mine, preferences.score(mine, scorer, 64, args.num_workers, show=accelerator.is_local_main_process), strict=True
    ):
        if reason:
            raise UserError(f"{choice.where}: {reason}")
        totals += (*preferences.agreement(scores, choice), 1)
    totals = accelerator.reduce(torch.tensor(totals, dtype=torch.float32, device=accelerator.device)).tolist()
    return {"test_accuracy": totals[0] / totals[3], "test_pairwise_accuracy": totals[1] / totals[2]}


class Window:
    """Means since the last log, over the prompts of all processes."""

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self.restart()

    def restart(self):
        self.sums, self.started = torch.zeros(6, device=self.accelerator.device), time.time()

    @torch.no_grad()
    def add(self, losses: list, logits: list, chosen: list[int]):
        beaten = [(x[choice] > x).sum() for x, choice in zip(logits, chosen, strict=True)]
        first = torch.stack([count == len(x) - 1 for count, x in zip(beaten, logits, strict=True)])
        sums = (torch.stack(losses).sum(), first.sum(), torch.stack(beaten).sum())
        self.sums[:3] += torch.stack([value.float() for value in sums])
        self.sums[3] += sum(len(x) - 1 for x in logits)
        self.sums[4] += len(logits)
        self.sums[5] += sum(map(len, logits))

    def means(self) -> dict[str, float]:
        """Return the means, and begin anew."""
        loss, first, beaten, pairs, prompts, images = self.accelerator.reduce(self.sums).tolist()
        seconds = time.time() - self.started
        self.restart()
        return {
            "loss": loss / prompts,
            "train_accuracy": first / prompts,
            "train_pairwise_accuracy": beaten / pairs,
            "images_per_second": images / seconds,
        }


# --- files ---


def begin_run(args, accelerator, train: list, test: list, errors: list[dict]) -> tuple[dict | None, Path]:
    """Return the run's record, None but on the main process, and the checkpoint's path; refuse output of other options.

    What does not change the result beyond rounding may differ from the run that is gone on with.
    """
    free = (
        "output", "micro_batch_size", "gradient_checkpointing", "checkpointing_steps", "logging_steps", "report_to",
        "num_workers", "cpu", "overwrite",
    )  # fmt: skip
    output, checkpoint = Path(args.output), Path(f"{args.output}.checkpoint")
    record = None
    if accelerator.is_main_process:
        settings = {key: value for key, value in vars(args).items() if key not in free}
        for split, choices in (("train", train), ("test", test)):
            said = repr([(choice.prompt, [image.name for image in choice.images], choice.ranks) for choice in choices])
            settings[split] = f"{len(choices)} prompts, SHA-256 {hashlib.sha256(said.encode()).hexdigest()[:16]}"
        settings["mixed_precision"] = accelerator.mixed_precision
        output.parent.mkdir(parents=True, exist_ok=True)
        old = [path for path in (output, best_path(args), checkpoint) if path.exists()]
        if args.overwrite:
            for path in old:
                path.unlink()
        # Without a checkpoint there is nothing to mix with, such as after a mistyped option.
        record = runs.begin(f"{output}.run.json", settings, overwrite=args.overwrite or not old)
        write_whole(f"{output}.errors.jsonl", "".join(map(dumps, errors)))
        for path in (output, best_path(args), checkpoint):
            temporary(path).unlink(missing_ok=True)  # of a killed run
        if output.exists():
            checkpoint.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return record, checkpoint


def best_path(args) -> Path:
    return Path(args.output).with_suffix(f".best{Path(args.output).suffix}")


def temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def save_whole(state: dict, path: Path):
    """torch.save that appears whole or not at all."""
    try:
        with open(temporary(path), "wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        fault = error if isinstance(error, OSError) else error.__context__  # torch passes over what the disk said
        if not isinstance(fault, OSError):
            raise
        temporary(path).unlink(missing_ok=True)
        raise OSError(fault.errno, fault.strerror, str(path)) from None
    os.replace(temporary(path), path)


def save_classifier(path: Path, scorer, args, accelerator, step: int, tested: dict):
    """Write the released format, and beside it what made it and how good it is."""
    if accelerator.is_main_process:
        hpc = {"state_dict": scorer.model.state_dict(), "model": scorer.config, "resize": scorer.resize}
        save_whole(hpc | {"options": vars(args), "step": step, **tested}, path)


def save_checkpoint(path: Path, step: int, best: float, model, optimizer, accelerator):
    if accelerator.is_main_process:
        state = {"step": step, "best": best, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save_whole(state | {"scaler": accelerator.scaler.state_dict() if accelerator.scaler else None}, path)


def load_checkpoint(path: Path, model, optimizer, accelerator) -> tuple[int, float]:
    """Restore a killed run; return its step and the best test accuracy so far, (0, -1) if there is none."""
    if not path.exists():
        return 0, -1.0
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if accelerator.scaler and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    accelerator.print(f"going on after step {state['step']}")
    return state["step"], state["best"]


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
