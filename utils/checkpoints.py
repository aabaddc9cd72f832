"""Checkpoints of the LoRA's training, in folders `checkpoint-{step}` that appear whole or not at all."""

import io
import os
import shutil
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from utils import lora
from utils.errors import UserError
from utils.jsonl import write_whole


def save_checkpoint(args, output: Path, step: int, model: str, unet, optimizer, lr_scheduler, accelerator):
    """Write checkpoint-{step}/ whole or not at all. No process has a state of its own: what is random comes from the pictures."""
    if not accelerator.is_main_process:
        return
    temporary = output / f".checkpoint-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    lora.save(temporary, unet)
    state = {
        "step": step,
        "model": model,
        "lora": get_peft_model_state_dict(unet),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": lr_scheduler.state_dict(),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
    }
    content = io.BytesIO()  # writing to a full disk itself, torch.save would not say so
    torch.save(state, content)
    write_whole(temporary / "training_state.pt", content.getvalue())
    shutil.rmtree(output / f"checkpoint-{step}", ignore_errors=True)
    os.replace(temporary, output / f"checkpoint-{step}")
    if args.checkpoints_total_limit:
        for path in checkpoints(output)[: -args.checkpoints_total_limit]:
            shutil.rmtree(path)


def checkpoints(output: Path) -> list[Path]:
    """Return the checkpoints of a run, the oldest first."""
    found = [path for path in output.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def load_checkpoint(args, output: Path, model: str, unet, optimizer, lr_scheduler, accelerator) -> int:
    """Restore the checkpoint to go on from; return its step, 0 if there is none."""
    # A checkpoint named by hand is where a run begins; a rerun goes on from its own.
    latest = args.resume_from_checkpoint in (None, "latest") or bool(checkpoints(output))
    candidates = reversed(checkpoints(output)) if latest else [Path(args.resume_from_checkpoint)]
    for path in candidates:
        if latest and int(path.name.split("-")[1]) > args.max_train_steps:
            continue
        try:
            state = torch.load(path / "training_state.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load fails in many ways
            reason = f"{path}: not a readable checkpoint: {str(error).splitlines()[0]}"
            if not latest:
                raise UserError(f"--resume_from_checkpoint {reason}") from None
            accelerator.print(reason)
            continue
        if state["model"] != model:
            raise UserError(
                f"{path}: was trained on other weights than {args.pretrained_model_name_or_path} has now "
                "(--pretrained_model_name_or_path); use --overwrite or another place"
            )
        if state["step"] > args.max_train_steps:
            raise UserError(f"{path}: is past --max_train_steps {args.max_train_steps}")
        try:
            set_peft_model_state_dict(unet, state["lora"])
        except RuntimeError:
            raise UserError(f"{path}: its LoRA has other shapes; is --lora_rank the same?") from None
        # The options are this run's; only the state is the checkpoint's.
        groups, rates = optimizer.state_dict()["param_groups"], lr_scheduler.base_lrs
        optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        lr_scheduler.load_state_dict(state["lr_scheduler"])
        lr_scheduler.base_lrs = rates
        for group, rate, factor in zip(optimizer.param_groups, rates, lr_scheduler.lr_lambdas, strict=True):
            group["lr"] = rate * factor(lr_scheduler.last_epoch)
        if state["scaler"] and accelerator.scaler:
            accelerator.scaler.load_state_dict(state["scaler"])
        accelerator.print(f"going on from {path}")
        return state["step"]
    return 0
