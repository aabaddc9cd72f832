"""Adapt Stable Diffusion to human preference: train a LoRA on its UNet.

    bash scripts/train_lora.sh                                          # the paper's recipe, on all GPUs of this machine
    accelerate launch train_lora.py --annotation_file annotation.jsonl \\
        --regularization_annotation regularization_images.jsonl --output_dir logs

Reads   annotation.jsonl of select_training_images.py (`file_name`, `prompt`, `type`) and
        regularization_images.jsonl of download_regularization_images.py (`file_name`, `caption`);
        file names count from --dataset_folder, by default from the folder of the file that names them
Writes  OUTPUT_DIR/pytorch_lora_weights.safetensors, checkpoint-N/ (the same command goes on from the latest one),
        validation/step-N.png, errors.jsonl (pictures left out), run.json and the trackers' files

The best pictures keep their prompts; the worst ones' prompts get the prefix "Weird image. ", so the model learns what
people dislike under a name, and the same words as negative prompt steer away from it (paper, section 5). Regularization
pictures with their own captions keep it from drifting. The loss is Stable Diffusion's own:

    z = VAE(x),  z_t = sqrt(a_t) z + sqrt(1 - a_t) noise,  loss = |UNet(z_t, t, prompt) - noise|^2     (or v for v-models)

Everything random about a picture (crop, flip, dropout, VAE sample, noise, timestep) comes from (seed, epoch, picture),
so a run depends neither on the number of workers or processes nor on being interrupted.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from utils import lora, runs
from utils.errors import UserError, one_line_errors
from utils.images import open_image, to_rgb
from utils.jsonl import Appender, dumps, read, write_whole


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Model.
    parser.add_argument("--pretrained_model_name_or_path", default="CompVis/stable-diffusion-v1-4")
    parser.add_argument("--revision", help="of the model on the hub")
    parser.add_argument("--cache_dir", help="where models from the hub are kept")
    parser.add_argument("--lora_rank", type=int, default=4)
    # Data.
    parser.add_argument(
        "--annotation_file", help="best and worst pictures; without it only regularization pictures train"
    )
    parser.add_argument("--regularization_annotation", help="regularization pictures")
    parser.add_argument(
        "--dataset_folder", help="file names count from here (default: the folder of the file naming them)"
    )
    parser.add_argument("--max_train_samples", type=int, help="use only so many pictures, drawn with the seed")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--center_crop", action="store_true", help="instead of a random crop")
    parser.add_argument("--random_flip", action="store_true")
    parser.add_argument(
        "--negative_prefix", default="Weird image. ", help="goes before the prompts of the worst pictures"
    )
    parser.add_argument(
        "--bare_prefix_prob", type=float, default=0.0,
        help="share of the worst pictures that train under the bare prefix, without their prompt; 0 as published",
    )  # fmt: skip
    parser.add_argument(
        "--prompt_dropout", type=float, default=0.0, help="share of pictures that train without any prompt"
    )
    parser.add_argument("--dataloader_num_workers", type=int, default=4)
    # Optimisation: the paper's recipe.
    parser.add_argument(
        "--train_batch_size", type=int, default=40, help="per process; the paper's 40 is the sum over all"
    )
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--max_train_steps", type=int, help="default: what --num_train_epochs takes")
    parser.add_argument("--num_train_epochs", type=int, default=100)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--scale_lr", action="store_true", help="multiply the learning rate by the global batch size")
    parser.add_argument("--lr_scheduler", default="constant", help="of diffusers: constant, cosine, linear, ...")
    parser.add_argument("--lr_warmup_steps", type=int, default=0)
    parser.add_argument("--adam_beta1", type=float, default=0.9)
    parser.add_argument("--adam_beta2", type=float, default=0.999)
    parser.add_argument("--adam_weight_decay", type=float, default=1e-2)
    parser.add_argument("--adam_epsilon", type=float, default=1e-8)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--gradient_checkpointing", action="store_true", help="less memory, a third more time")
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: accelerate's configuration")
    parser.add_argument("--allow_tf32", action="store_true")
    parser.add_argument("--seed", type=int, default=42)
    # Output.
    parser.add_argument("--output_dir", default="sd-model-finetuned-lora")
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--resume_from_checkpoint", default="latest", help='"latest", or a checkpoint folder')
    parser.add_argument("--overwrite", action="store_true", help="start anew, removing the checkpoints of another run")
    parser.add_argument("--report_to", default="tensorboard", help="tensorboard, wandb, all or none")
    parser.add_argument("--logging_dir", default="logs", help="of the trackers, inside OUTPUT_DIR")
    # Validation.
    parser.add_argument("--validation_prompt_file", help="a prompt a line; pictures of them show how the training goes")
    parser.add_argument("--num_validation_images", type=int, default=4, help="for each prompt")
    parser.add_argument("--validation_iters", type=int, default=5000, help="steps between validations")
    parser.add_argument("--validation_inference_steps", type=int, default=50)
    parser.add_argument("--validation_guidance_scale", type=float, default=7.5)
    parser.add_argument("--cpu", action="store_true", help="train on the CPU even if there is a GPU")
    return parser.parse_args(argv)


def main(args):
    tracker = None if args.report_to == "none" else args.report_to
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=tracker, project_dir=Path(args.output_dir) / args.logging_dir, cpu=args.cpu,
    )  # fmt: skip
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    global_batch = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    if args.scale_lr:
        args.learning_rate *= global_batch

    # Read the rows, and refuse to mix with a half-finished run of other options.
    rows, errors = read_rows(args)
    validation_prompts = read_validation_prompts(args.validation_prompt_file)
    if args.max_train_steps is None:
        args.max_train_steps = math.ceil(args.num_train_epochs * len(rows) / global_batch)
    output = Path(args.output_dir)
    record = begin_run(args, accelerator, output, rows, errors)
    accelerator.wait_for_everyone()
    if (output / lora.FILE_NAMES[0]).exists() and record.get("steps") == args.max_train_steps:
        accelerator.print(f"{output} is finished; nothing to do")
        return

    # Load Stable Diffusion, freeze all of it, and add the LoRA. Only the LoRA trains, in fp32.
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    pipe = load_pipeline(args, dtype).to(accelerator.device)
    vae, text_encoder, unet = pipe.vae, pipe.text_encoder, pipe.unet
    for model in (vae, text_encoder, unet):
        model.requires_grad_(False)
    torch.manual_seed(args.seed)
    unet.add_adapter(
        LoraConfig(
            r=args.lora_rank,
            lora_alpha=args.lora_rank,
            init_lora_weights="gaussian",
            target_modules=lora.TARGET_MODULES,
        )
    )
    cast_training_params(unet, torch.float32)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay, eps=args.adam_epsilon,
    )  # fmt: skip
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, args.lr_warmup_steps, args.max_train_steps)

    # Go on from the latest checkpoint. The UNet itself is prepared, so that every process's gradients are averaged.
    step = load_checkpoint(args, output, unet, optimizer, lr_scheduler, accelerator)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    bare_unet = accelerator.unwrap_model(unet)

    batches = TrainingBatches(rows, pipe, noise_scheduler, args, accelerator, first_step=step)
    loader = DataLoader(
        batches, batch_size=None, num_workers=args.dataloader_num_workers, pin_memory=accelerator.device.type == "cuda"
    )
    if accelerator.is_main_process and tracker:
        accelerator.init_trackers("train_lora", config={k: v for k, v in vars(args).items() if v is not None})
    bar = tqdm(
        total=args.max_train_steps,
        initial=step,
        desc="train_lora",
        unit="step",
        disable=not accelerator.is_local_main_process,
    )
    started, step_loss = time.time(), 0.0

    # Train.
    for batch in loader:
        batch = {key: value.to(accelerator.device, non_blocking=True) for key, value in batch.items()}
        with accelerator.accumulate(unet):
            # The posterior's sample: mean + std * noise, the noise drawn with the picture.
            with torch.no_grad():
                posterior = vae.encode(batch["pixels"].to(dtype)).latent_dist
                latents = (posterior.mean + posterior.std * batch["vae_noise"]) * vae.config.scaling_factor
                prompt_embeds = text_encoder(batch["tokens"])[0]
            noise, timesteps = batch["noise"], batch["timesteps"]
            noisy_latents = noise_scheduler.add_noise(latents.float(), noise, timesteps)
            if noise_scheduler.config.prediction_type == "v_prediction":
                target = noise_scheduler.get_velocity(latents.float(), noise, timesteps)
            else:
                target = noise
            with accelerator.autocast():
                prediction = unet(noisy_latents.to(dtype), timesteps, prompt_embeds).sample
            loss = F.mse_loss(prediction.float(), target)

            accelerator.backward(loss)
            step_loss += accelerator.reduce(loss.detach(), "mean").item() / args.gradient_accumulation_steps
            if not accelerator.sync_gradients:
                continue
            gradient_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()

        step += 1
        logs = {"loss": step_loss, "lr": lr_scheduler.get_last_lr()[0], "gradient_norm": float(gradient_norm)}
        accelerator.log(logs, step=step)
        bar.set_postfix(loss=f"{step_loss:.4f}", lr=f"{logs['lr']:.1e}", refresh=False)
        bar.update()
        step_loss = 0.0
        if step % args.checkpointing_steps == 0 and step < args.max_train_steps:
            save_checkpoint(output, step, bare_unet, optimizer, lr_scheduler, accelerator)
        if validation_prompts and (step % args.validation_iters == 0 or step == args.max_train_steps):
            validate(pipe, validation_prompts, step, output, args, accelerator)
    bar.close()

    # Save the LoRA.
    if accelerator.is_main_process:
        lora.save(output, bare_unet)
        runs.finish(
            output / "run.json", record, steps=step, pictures=len(rows), seconds=round(time.time() - started, 1)
        )
        print(f"LoRA after {step} steps of {global_batch} pictures: {output / lora.FILE_NAMES[0]}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


# --- data ---


def read_rows(args) -> tuple[list[dict], list[dict]]:
    """Return the rows to train on (`image` path, `prompt`, `type`) and those left out because the picture is unusable."""
    if not args.annotation_file and not args.regularization_annotation:
        raise UserError("nothing to train on: give --annotation_file, --regularization_annotation or both")
    rows = []
    for path, caption in ((args.annotation_file, "prompt"), (args.regularization_annotation, "caption")):
        if not path:
            continue
        folder = Path(args.dataset_folder or Path(path).parent)
        fields = {"file_name": str, caption: str} | ({"type": str} if caption == "prompt" else {})
        for number, row in enumerate(read(path, fields), 1):
            kind = row.get("type") if caption == "prompt" else "regularization"
            if kind not in ("positive", "negative", "regularization"):
                raise UserError(f"{path}: row {number}: type is {kind!r}, not positive or negative")
            if Path(row["file_name"]).is_absolute() or ".." in Path(row["file_name"]).parts:
                raise UserError(f"{path}: row {number}: {row['file_name']!r} leaves the folder")
            where = f"{path}: row {number}: {row['file_name']}"
            rows.append({"image": folder / row["file_name"], "prompt": row[caption], "type": kind, "where": where})
    if args.max_train_samples and args.max_train_samples < len(rows):
        chosen = np.random.default_rng(args.seed).permutation(len(rows))[: args.max_train_samples]
        rows = [rows[i] for i in sorted(chosen)]

    # Missing files and files that are no pictures are found now, not at step 4,000.
    with ThreadPoolExecutor() as pool:
        reasons = list(pool.map(why_unusable, (row["image"] for row in rows)))
    errors = [
        {"item": row["where"], "stage": "read", "reason": reason}
        for row, reason in zip(rows, reasons, strict=True)
        if reason
    ]
    usable = [row for row, reason in zip(rows, reasons, strict=True) if not reason]
    if not usable:
        first = f"; the first: {errors[0]['item']}: {errors[0]['reason']}" if errors else ""
        raise UserError(f"no usable picture in {args.annotation_file or args.regularization_annotation}{first}")
    return usable, errors


def why_unusable(path: Path) -> str | None:
    """Return what a look at the file's head finds wrong, or None."""
    try:
        Image.open(path).close()
    except FileNotFoundError:
        return "no such file"
    except (OSError, Image.DecompressionBombError) as error:
        return f"not a readable picture: {error}".replace(f" {str(path)!r}", "")
    return None


class TrainingBatches(Dataset):
    """The micro-batches of this process from `first_step` on: pixels, tokens, timesteps, noise and the VAE's noise.

    The pictures come as an endless row of epochs, each in an order of (seed, epoch); step k takes the k-th global batch
    of it, and the micro-batches and processes share that batch out.
    """

    def __init__(self, rows, pipe, noise_scheduler, args, accelerator, first_step):
        self.rows, self.tokenizer, self.args = rows, pipe.tokenizer, args
        self.timesteps = noise_scheduler.config.num_train_timesteps
        side = args.resolution // pipe.vae_scale_factor
        self.latent_shape = (pipe.vae.config.latent_channels, side, side)
        self.rank, self.processes, self.first_step = accelerator.process_index, accelerator.num_processes, first_step

    def __len__(self):
        return (self.args.max_train_steps - self.first_step) * self.args.gradient_accumulation_steps

    def __getitem__(self, index):
        micro_batch = self.first_step * self.args.gradient_accumulation_steps + index
        start = (micro_batch * self.processes + self.rank) * self.args.train_batch_size
        items = [self.load(*divmod(i, len(self.rows))) for i in range(start, start + self.args.train_batch_size)]
        batch = {key: torch.stack([item[key] for item in items]) for key in items[0] if key != "prompt"}
        batch["tokens"] = self.tokenizer(
            [item["prompt"] for item in items], padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        return batch

    def load(self, epoch: int, position: int) -> dict:
        """Return one training example, drawn from (seed, epoch, picture)."""
        picture = int(epoch_order(self.args.seed, epoch, len(self.rows))[position])
        while True:
            row = self.rows[picture]
            try:
                image = to_rgb(open_image(row["image"]))
                break
            except ValueError as error:
                # Its head was fine, its body is not: the next picture takes its place.
                with Appender(Path(self.args.output_dir) / "errors.jsonl") as file:
                    file.write({"item": row["where"], "stage": "train", "reason": str(error)})
                print(f"{row['where']}: {error}; another picture takes its place", file=sys.stderr)
                picture = (picture + 1) % len(self.rows)

        seed = np.random.SeedSequence((self.args.seed, epoch, picture)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(seed))
        uniform = torch.rand(5, generator=generator).tolist()
        prompt = row["prompt"]
        if row["type"] == "negative":
            prompt = self.args.negative_prefix + ("" if uniform[0] < self.args.bare_prefix_prob else prompt)
        if uniform[1] < self.args.prompt_dropout:
            prompt = ""
        return {
            "pixels": self.crop(image, *uniform[2:]),
            "prompt": prompt,
            "timesteps": torch.randint(0, self.timesteps, (), generator=generator),
            "noise": torch.randn(self.latent_shape, generator=generator),
            "vae_noise": torch.randn(self.latent_shape, generator=generator),
        }

    def crop(self, image: Image.Image, x: float, y: float, flip: float) -> torch.Tensor:
        """Return the picture with its shortest side resized, cropped to a square: float32 (3, resolution, resolution) in [-1, 1]."""
        side = self.args.resolution
        scale = side / min(image.size)
        width, height = max(side, round(image.width * scale)), max(side, round(image.height * scale))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        if self.args.center_crop:
            x = y = 0.5
        left, top = round(x * (width - side)), round(y * (height - side))
        image = image.crop((left, top, left + side, top + side))
        if self.args.random_flip and flip < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return pil_to_tensor(image).float() / 127.5 - 1


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return the order of the pictures in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count)


# --- model, checkpoints, validation ---


def load_pipeline(args, dtype) -> StableDiffusionPipeline:
    """Return Stable Diffusion's parts as one pipeline, from the hub or a folder."""
    try:
        pipe = StableDiffusionPipeline.from_pretrained(
            args.pretrained_model_name_or_path, revision=args.revision, cache_dir=args.cache_dir, dtype=dtype,
            safety_checker=None, requires_safety_checker=False,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}: {reason}") from None
    pipe.set_progress_bar_config(disable=True)
    return pipe


def begin_run(args, accelerator, output: Path, rows: list[dict], errors: list[dict]) -> dict:
    """Record the options that the weights depend on, or refuse a folder that was begun with others."""
    free = (
        "output_dir", "max_train_steps", "num_train_epochs", "checkpointing_steps", "resume_from_checkpoint", "overwrite",
        "report_to", "logging_dir", "dataloader_num_workers", "cache_dir", "cpu", "gradient_checkpointing",
    )  # fmt: skip
    settings = {key: value for key, value in vars(args).items() if key not in free and "validation" not in key}
    settings |= {"processes": accelerator.num_processes}
    settings |= {
        f"{kind}_pictures": sum(row["type"] == kind for row in rows)
        for kind in ("positive", "negative", "regularization")
    }
    if not accelerator.is_main_process:
        return (
            json.loads((output / "run.json").read_text())
            if (output / "run.json").exists() and not args.overwrite
            else {}
        )
    output.mkdir(parents=True, exist_ok=True)
    old = [*output.glob("checkpoint-*"), *output.glob(lora.FILE_NAMES[0])]
    if args.overwrite:
        for path in old:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    # Without a checkpoint there is nothing to mix with, such as after a mistyped option.
    record = runs.begin(output / "run.json", settings, overwrite=args.overwrite or not old)
    write_whole(output / "errors.jsonl", "".join(map(dumps, errors)))
    print(
        ", ".join(f"{settings[f'{kind}_pictures']} {kind}" for kind in ("positive", "negative", "regularization")),
        "pictures",
    )
    if errors:
        print(f"{len(errors)} pictures left out, see {output / 'errors.jsonl'}", file=sys.stderr)
    return record


def save_checkpoint(output: Path, step: int, unet, optimizer, lr_scheduler, accelerator):
    """Write checkpoint-{step}/ whole or not at all. No process has a state of its own: what is random comes from the pictures."""
    if not accelerator.is_main_process:
        return
    temporary = output / f".checkpoint-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    lora.save(temporary, unet)
    state = {
        "step": step,
        "lora": get_peft_model_state_dict(unet),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": lr_scheduler.state_dict(),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
    }
    torch.save(state, temporary / "training_state.pt")
    shutil.rmtree(output / f"checkpoint-{step}", ignore_errors=True)
    os.replace(temporary, output / f"checkpoint-{step}")


def load_checkpoint(args, output: Path, unet, optimizer, lr_scheduler, accelerator) -> int:
    """Restore the checkpoint to go on from; return its step, 0 if there is none."""
    if args.resume_from_checkpoint in (None, "latest"):
        found = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        found = [path for path in found if int(path.name.split("-")[1]) <= args.max_train_steps]
        if not found:
            return 0
        path = found[-1]
    else:
        path = Path(args.resume_from_checkpoint)
    if not (path / "training_state.pt").is_file():
        raise UserError(f"--resume_from_checkpoint {path}: no training_state.pt in it")
    state = torch.load(path / "training_state.pt", map_location="cpu", weights_only=True)
    set_peft_model_state_dict(unet, state["lora"])
    optimizer.load_state_dict(state["optimizer"])
    lr_scheduler.load_state_dict(state["lr_scheduler"])
    if state["scaler"] and accelerator.scaler:
        accelerator.scaler.load_state_dict(state["scaler"])
    accelerator.print(f"going on from {path}")
    return state["step"]


def read_validation_prompts(path: str | None) -> list[str]:
    """Return the lines of the file that are not empty."""
    if not path:
        return []
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; write a prompt a line into it (echo 'your prompt' >> {path})")
    return [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


@torch.no_grad()
def validate(pipe, prompts: list[str], step: int, output: Path, args, accelerator):
    """Draw the same pictures as at every validation, three ways: plain, with the prefix, with the prefix as negative prompt."""
    if accelerator.is_main_process:
        pipe.unet.eval()
        prompts = [prompt for prompt in prompts for _ in range(args.num_validation_images)]
        ways = {
            "plain": (prompts, ""),
            "prefixed": ([args.negative_prefix + prompt for prompt in prompts], ""),
            "negative_prompt": (prompts, args.negative_prefix),
        }
        draw = partial(
            pipe, num_inference_steps=args.validation_inference_steps, guidance_scale=args.validation_guidance_scale,
            height=args.resolution, width=args.resolution,
        )  # fmt: skip
        bands = []
        for way, (positive, negative) in ways.items():
            images = []
            for i in range(0, len(prompts), args.train_batch_size):
                texts = positive[i : i + args.train_batch_size]
                generators = [torch.Generator().manual_seed(args.seed + i + j) for j in range(len(texts))]
                with accelerator.autocast():
                    images += draw(texts, negative_prompt=[negative] * len(texts), generator=generators).images
            bands.append(np.concatenate([np.asarray(image) for image in images], axis=1))
            for tracker in accelerator.trackers:
                if tracker.name == "tensorboard":
                    tracker.writer.add_images(way, np.stack([np.asarray(i) for i in images]), step, dataformats="NHWC")
                if tracker.name == "wandb":
                    import wandb

                    shown = [wandb.Image(image, caption=text) for image, text in zip(images, positive, strict=True)]
                    tracker.log({way: shown}, step=step)
        (output / "validation").mkdir(exist_ok=True)
        Image.fromarray(np.concatenate(bands)).save(output / "validation" / f"step-{step:06d}.png")
        pipe.unet.train()
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
