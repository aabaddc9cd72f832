"""Fine-tune CLIP on human choices into the Human Preference Classifier (HPC).

    python train_hpc.py --dataset_folder dataset --output hpc.pth
    accelerate launch train_hpc.py --dataset_folder dataset --output hpc.pth

Reads   DATASET_FOLDER/preference_{train,test}.json and preference_images/ (the released format; "Human preference dataset"
        in the README)
Writes  OUTPUT: {"state_dict": OpenAI CLIP's names, "model", "options", "test_accuracy"}, which every scoring stage reads,
        OUTPUT.run.json, OUTPUT.errors.jsonl (dropped prompts) and, while it runs, OUTPUT.checkpoint (a rerun goes on there)

People saw the n images of one prompt and chose one. The classifier's probability for image i is a softmax within the
prompt (paper, section 4), and the loss is its cross-entropy with the choice:

    p_i = exp(s * cos(image_i, prompt)) / sum_j exp(s * cos(image_j, prompt))        loss = -log p_chosen
"""

import argparse
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from utils import hps, runs
from utils.errors import UserError, one_line_errors
from utils.images import open_image
from utils.jsonl import check, dumps, read_array, write_whole


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_folder", default="dataset")
    parser.add_argument("--output", default="hpc.pth")
    # Model.
    parser.add_argument("--model", default="ViT-L-14-quickgelu", help="open_clip name, or path of a JSON config")
    parser.add_argument("--pretrained", default="openai", help="open_clip tag, or path of the weights")
    parser.add_argument("--unlocked_image_layers", type=int, default=10, help="last image blocks that train")
    parser.add_argument("--unlocked_text_layers", type=int, default=6, help="last text blocks that train")
    # Optimisation: the paper's recipe.
    parser.add_argument("--learning_rate", type=float, default=1.7e-5)
    parser.add_argument("--weight_decay", type=float, default=3.1e-3, help="of matrices; none on norms and biases")
    parser.add_argument("--batch_size", type=int, default=5, help="prompts a step and process")
    parser.add_argument("--num_train_epochs", type=int, default=1)
    parser.add_argument("--warmup_steps", type=int, default=0)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: accelerate's configuration")
    parser.add_argument("--seed", type=int, default=42)
    # Machinery.
    parser.add_argument("--num_workers", type=int, default=4, help="processes that decode images")
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--cpu", action="store_true", help="train on the CPU even if there is a GPU")
    parser.add_argument("--overwrite", action="store_true", help="start anew over output made with other options")
    return parser.parse_args(argv)


def main(args):
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=args.cpu)
    main_process, started = accelerator.is_main_process, time.time()

    # Read the choices; prompts whose pictures are not all there are dropped and logged.
    errors = []
    train_rows = read_choices(Path(args.dataset_folder), "train", errors)
    test_rows = read_choices(Path(args.dataset_folder), "test", errors)

    # Refuse to mix with a half-finished run of other options; a finished one has nothing left to do.
    record_path = f"{args.output}.run.json"
    free = ("num_workers", "checkpointing_steps", "cpu", "overwrite")
    settings = {key: value for key, value in vars(args).items() if key not in free}
    settings |= {"processes": accelerator.num_processes, "prompts": len(train_rows)}
    record, checkpoint_path = None, Path(f"{args.output}.checkpoint")
    if main_process:
        old = [path for path in (Path(args.output), checkpoint_path) if path.exists()]
        if args.overwrite:
            for path in old:
                path.unlink()
        # Without a checkpoint there is nothing to mix with, such as after a mistyped option.
        record = runs.begin(record_path, settings, overwrite=args.overwrite or not old)
        write_whole(f"{args.output}.errors.jsonl", "".join(map(dumps, errors)))
    accelerator.wait_for_everyone()
    if Path(args.output).exists():
        accelerator.print(f"{args.output} is finished; nothing to do")
        return

    # Load CLIP and unlock its upper blocks. Frozen blocks see no gradient, so autograd keeps nothing of them.
    scorer = hps.load(model=args.model, pretrained=args.pretrained, device=accelerator.device)
    unlock(scorer.model, args.unlocked_image_layers, args.unlocked_text_layers)
    optimizer = make_optimizer(scorer.model, args)
    per_step = args.batch_size * accelerator.num_processes
    steps = args.num_train_epochs * math.ceil(len(train_rows) / per_step)
    step = load_checkpoint(checkpoint_path, scorer.model, optimizer)
    model, optimizer = accelerator.prepare(scorer.model, optimizer)

    # Train.
    batches = PromptBatches(train_rows, scorer, args, accelerator, first_step=step)
    bar = tqdm(total=steps, initial=step, desc="train_hpc", unit="step", disable=not main_process)
    for pixels, tokens, counts, chosen, prompts_in_step in DataLoader(
        batches, batch_size=None, num_workers=args.num_workers, pin_memory=accelerator.device.type == "cuda"
    ):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * schedule(step, steps, args.warmup_steps)
        with accelerator.autocast():
            image_features, text_features, scale = model(
                pixels.to(accelerator.device, non_blocking=True), tokens.to(accelerator.device, non_blocking=True)
            )
        # Cross-entropy of the choice with the softmax over the images of its prompt, prompt by prompt.
        losses = [
            -F.log_softmax(scale * images.float() @ text.float(), dim=0)[choice]
            for images, text, choice in zip(image_features.split(counts), text_features, chosen, strict=True)
        ]
        # The mean over the step's prompts of all processes: DDP averages over processes, hence their number.
        loss = torch.stack(losses).sum() * accelerator.num_processes / prompts_in_step
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        scorer.model.logit_scale.data.clamp_(0, math.log(100))  # as CLIP
        step += 1
        bar.set_postfix(loss=f"{loss.item():.3f}", lr=f"{optimizer.param_groups[0]['lr']:.1e}", refresh=False)
        bar.update()
        if main_process and step % args.checkpointing_steps == 0 and step < steps:
            state = {"step": step, "model": scorer.model.state_dict(), "optimizer": optimizer.state_dict()}
            save_whole(state, checkpoint_path)
    bar.close()

    # Measure, then write the classifier whole.
    top1, pairwise = accuracy(scorer, test_rows, args, accelerator)
    if main_process:
        hpc = {"state_dict": scorer.model.state_dict(), "model": scorer.config, "resize": scorer.resize}
        hpc |= {"options": vars(args), "test_accuracy": top1}
        save_whole(hpc, Path(args.output))
        checkpoint_path.unlink(missing_ok=True)
        results = {"test_accuracy": top1, "test_pairwise_accuracy": pairwise, "seconds": time.time() - started}
        counts = {"train_prompts": len(train_rows), "test_prompts": len(test_rows), "dropped_prompts": len(errors)}
        runs.finish(record_path, record, **results, **counts)
        print(f"test accuracy: {top1:.4f} (pairwise {pairwise:.4f}) on {len(test_rows)} prompts; dropped {len(errors)}")


def read_choices(folder: Path, split: str, errors: list[dict]) -> list[dict]:
    """Return the usable rows of preference_{split}.json: `prompt`, `images` (paths), `chosen` (index into them)."""
    path = folder / f"preference_{split}.json"
    rows = []
    for i, row in enumerate(read_array(path)):
        check(row, {"human_preference": int, "prompt": str, "file_path": list}, f"{path}: element {i}")
        names, chosen = row["file_path"], row["human_preference"]
        if not 0 <= chosen < len(names):
            raise UserError(f"{path}: element {i}: human_preference {chosen} is no index of its {len(names)} images")
        images = []
        for name in names:
            if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(f"{path}: element {i}: the path {name!r} leaves the data set's folder")
            images.append(folder / "preference_images" / name)
            if not images[-1].is_file():
                images[-1] = folder / name
        rows.append({"item": f"{path.name}: element {i}", "prompt": row["prompt"], "images": images, "chosen": chosen})

    # Decode every picture once: one that is broken is found now, not in the middle of an epoch.
    with ThreadPoolExecutor() as pool:
        reasons = list(tqdm(pool.map(why_unusable, rows), total=len(rows), desc=f"check {split}", unit="prompt"))
    errors += [{"item": row["item"], "stage": "read", "reason": r} for row, r in zip(rows, reasons, strict=True) if r]
    rows = [row for row, reason in zip(rows, reasons, strict=True) if not reason]
    if not rows:
        raise UserError(f"{path}: no usable prompts in it")
    return rows


def why_unusable(row: dict) -> str | None:
    """Return why no choice can be learned from these pictures, or None."""
    if len(row["images"]) < 2:
        return "a choice needs two images"
    for image in row["images"]:
        try:
            open_image(image)
        except ValueError as error:
            return f"{image.name}: {error}"
    return None


class PromptBatches(Dataset):
    """The batches of this process from `first_step` on; each is (pixels, tokens, images a prompt, choices, prompts of all).

    The order of the prompts comes from (seed, epoch), so it is the same after a restart and for any number of workers.
    """

    def __init__(self, rows, scorer, args, accelerator, first_step=0):
        self.rows, self.preprocess, self.tokenizer, self.args = rows, scorer.preprocess, scorer.tokenizer, args
        self.rank, self.processes, self.first_step = accelerator.process_index, accelerator.num_processes, first_step
        self.per_step = args.batch_size * self.processes
        # Every process needs a prompt in the last step too: the remainder is dealt round.
        self.per_epoch = math.ceil(len(rows) / self.per_step)

    def __len__(self):
        return self.args.num_train_epochs * self.per_epoch - self.first_step

    def __getitem__(self, index):
        epoch, position = divmod(index + self.first_step, self.per_epoch)
        order = np.random.default_rng((self.args.seed, epoch)).permutation(len(self.rows))
        whole = order[position * self.per_step : (position + 1) * self.per_step]
        if len(whole) < self.processes:
            whole = np.concatenate([whole, order])[: self.processes]
        return *self.load([self.rows[i] for i in whole[self.rank :: self.processes]]), len(whole)

    def load(self, rows):
        pixels = torch.stack([self.preprocess(open_image(path)) for row in rows for path in row["images"]])
        tokens = self.tokenizer([row["prompt"] for row in rows])
        return pixels, tokens, [len(row["images"]) for row in rows], [row["chosen"] for row in rows]


def unlock(model, image_layers: int, text_layers: int):
    """Let only the last blocks train, and what comes after them: final norms, projections and the logit scale."""
    model.requires_grad_(False)
    trained = [*model.visual.transformer.resblocks[-image_layers:]] if image_layers else []
    trained += [*model.transformer.resblocks[-text_layers:]] if text_layers else []
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


def load_checkpoint(path: Path, model, optimizer) -> int:
    """Restore a killed run; return its step, 0 if there is none."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def save_whole(state: dict, path: Path):
    """torch.save that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


@torch.no_grad()
def accuracy(scorer, rows, args, accelerator) -> tuple[float, float]:
    """Return (top-1, pairwise) accuracy: how often the chosen image scores highest, and how often above another one."""
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    first = beaten = pairs = 0
    for row in tqdm(mine, desc="test", unit="prompt", disable=not accelerator.is_main_process):
        pixels = torch.stack([scorer.preprocess(open_image(path)) for path in row["images"]])
        scores = (scorer.encode_images(pixels) @ scorer.encode_prompts([row["prompt"]]).T).squeeze(1)
        others = torch.cat([scores[: row["chosen"]], scores[row["chosen"] + 1 :]])
        first += bool((scores[row["chosen"]] > others).all())
        beaten += int((scores[row["chosen"]] > others).sum())
        pairs += len(others)
    totals = accelerator.reduce(torch.tensor([first, beaten, pairs, len(mine)], device=accelerator.device)).tolist()
    return totals[0] / totals[3], totals[1] / totals[2]


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
