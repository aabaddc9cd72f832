"""LoRA training: the plain loop, train_lora.py without and with a latent cache, and the limit, in one run.

    python -m benchmarks.training       # on a CPU the toy model, on a GPU full-size SD 1.4 with random weights at 512 px, bf16

The plain loop is the step of diffusers' train_text_to_image_lora.py, with its data loading. The limit is the UNet's
forward and backward alone on resident tensors; without a cache the VAE's encoding belongs to it. The loader alone says
whether decoding keeps up. Best of three times 10 steps each, every row in a process of its own.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import train_lora
from benchmarks import full_size
from benchmarks.tables import apart, report, seconds
from toy import world
from utils import lora, training_pictures
from utils.latents import encode_pixels

STEPS, WINDOWS = 10, 3  # after one window to warm up
TOY = Path("toy/models/stable-diffusion")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_batch_size", type=int, default=40)
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--dataloader_num_workers", type=int, help="default: 1 on a CPU, else 8")
    parser.add_argument("--profile", action="store_true", help="print where the time of train_lora.py's steps goes")
    return parser.parse_args(argv)


def main(args):
    gpu = torch.cuda.is_available()
    if args.dataloader_num_workers is None:
        args.dataloader_num_workers = 8 if gpu else 1
    if not gpu:  # the workers have cores of their own, in every row
        os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() - args.dataloader_num_workers))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        resolution = 512 if gpu else 32
        write_pictures(folder, args.pictures, resolution)
        model = folder / "model" if gpu else TOY
        if gpu:
            full_size.stable_diffusion().to(torch.bfloat16).save_pretrained(model)
        options = (
            f"--pretrained_model_name_or_path {model} --annotation_file {folder}/annotation.jsonl "
            f"--resolution {resolution} --train_batch_size {args.train_batch_size} "
            f"--max_train_steps {STEPS * (WINDOWS + 1)} --checkpointing_steps 1000 --logging_steps {STEPS} "
            f"--dataloader_num_workers {args.dataloader_num_workers} --report_to none "
            f"--mixed_precision {'bf16' if gpu else 'no'} --check_data no"
        ).split()
        cached = ["--cache_latents", f"{folder}/latents"]
        apart(ours, [*options, *cached, "--output_dir", f"{folder}/fill", "--max_train_steps", "1"])
        rows = [("plain loop, VAE online", plain, options)]
        rows += [("ours, VAE online", ours, [*options, "--output_dir", f"{folder}/online"])]
        rows += [("ours, latents cached", ours, [*options, *cached, "--output_dir", f"{folder}/cached"])]
        if gpu:
            compiled = [*options, *cached, "--compile", "--output_dir", f"{folder}/compiled"]
            rows += [("ours, latents cached, --compile", ours, compiled)]
            rows += [("UNet, compiled", limit_compiled, options)]
        rows += [("limit: UNet", limit, options), ("UNet and VAE", limit_with_vae, options)]
        rows += [("loader alone, VAE online", loader_alone, options)]
        table = []
        for what, function, argv in rows:
            speed, peak = apart(function, argv)
            table.append({"what": what, "speed": speed, "peak_gib": peak})
        report(
            "training", table, batch=args.train_batch_size, resolution=resolution,
            workers=args.dataloader_num_workers, threads=os.environ.get("OMP_NUM_THREADS", "all"), model="SD 1.4, random weights" if gpu else "toy",
        )  # fmt: skip
        speeds = {row["what"]: row["speed"] for row in table}
        print(f"ours, VAE online, of UNet and VAE: {speeds['ours, VAE online'] / speeds['UNet and VAE']:.0%}")
        if args.profile:
            apart(profiled, [*options, *cached, "--output_dir", f"{folder}/profiled", "--max_train_steps", "10"])


def write_pictures(folder: Path, count: int, resolution: int):
    """Write pictures a quarter higher than wide, JPEG if they are large, and their annotation."""
    rng = np.random.default_rng(0)
    captions = world.captions()
    with open(folder / "annotation.jsonl", "w") as file:
        for i in range(count):
            name, prompt = f"{i}.{'png' if resolution < 64 else 'jpg'}", captions[i % len(captions)]
            picture = world.render(prompt, rng, i % 2 == 1).resize((resolution, resolution * 5 // 4))
            noise = rng.normal(0, 4, (picture.height, picture.width, 3))
            Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8)).save(folder / name)
            row = {"file_name": name, "prompt": prompt, "type": "negative" if i % 2 else "positive"}
            file.write(json.dumps(row) + "\n")


def ours(argv: list[str]) -> float:
    """Return images/s of train_lora.py, from its own log."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    args = train_lora.parse_args(argv)
    train_lora.main(args)
    rows = [json.loads(line) for line in open(Path(args.output_dir) / "log.jsonl")]
    return max(row["images_per_second"] for row in rows[STEPS:] or rows)


def profiled(argv: list[str]):
    """Print the operators that take most of train_lora.py's time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * torch.cuda.is_available()
    with torch.profiler.profile(activities=activities) as profile:
        train_lora.main(train_lora.parse_args(argv))
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=40))


class Pictures(Dataset):
    """The example's preprocessing: resize, random crop, normalise, and the token ids."""

    def __init__(self, args, tokenizer):
        self.rows = training_pictures.read_rows(args)
        self.tokens = training_pictures.tokenize(tokenizer, [row["prompt"] for row in self.rows])
        self.transform = transforms.Compose(
            [
                transforms.Resize(args.resolution, interpolation=transforms.InterpolationMode.BILINEAR),
                transforms.RandomCrop(args.resolution),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )

    def __len__(self):
        return 10**6  # one epoch: the example starts its workers anew in each

    def __getitem__(self, index):
        index %= len(self.rows)
        image = Image.open(self.rows[index]["image"]).convert("RGB")
        return {"pixel_values": self.transform(image), "input_ids": self.tokens[index]}


def model_with_lora(args, dtype, device) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path, dtype=dtype, safety_checker=None)
    pipe.to(device)
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.requires_grad_(False)
    config = {"r": args.lora_rank, "lora_alpha": args.lora_rank, "init_lora_weights": "gaussian"}
    pipe.unet.add_adapter(LoraConfig(**config, target_modules=lora.TARGET_MODULES))
    for parameter in pipe.unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    pipe.unet.train()
    return pipe


def plain(argv: list[str]) -> float:
    """Return images/s of the example's loop."""
    args = train_lora.parse_args(argv)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    dtype = {"bf16": torch.bfloat16}.get(args.mixed_precision, torch.float32)
    pipe = model_with_lora(args, dtype, accelerator.device)
    vae, text_encoder, unet = pipe.vae, pipe.text_encoder, pipe.unet
    noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    lora_layers = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(lora_layers, lr=args.learning_rate)
    loader = DataLoader(
        Pictures(args, pipe.tokenizer), args.train_batch_size, shuffle=True, num_workers=args.dataloader_num_workers
    )
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)

    speeds, stream = [], iter(loader)
    for window in range(WINDOWS + 1):
        start = time.perf_counter()
        for _ in range(STEPS):
            batch = next(stream)
            latents = vae.encode(batch["pixel_values"].to(dtype=dtype)).latent_dist.sample()
            latents = latents * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device)
            noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
            encoder_hidden_states = text_encoder(batch["input_ids"], return_dict=False)[0]
            if noise_scheduler.config.prediction_type == "v_prediction":
                target = noise_scheduler.get_velocity(latents, noise, timesteps)
            else:
                target = noise
            model_pred = unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
            loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
            accelerator.gather(loss.repeat(args.train_batch_size)).mean().item()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(lora_layers, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if window:
            speeds.append(STEPS * args.train_batch_size / (time.perf_counter() - start))
    return max(speeds)


def limit(argv: list[str], vae: bool = False, compiled: bool = False) -> float:
    """Return images/s of the UNet's forward and backward alone, or with the VAE's encoding, or with its blocks compiled."""
    args = train_lora.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    pipe = model_with_lora(args, dtype, device)
    unet = pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    train_lora.make_lean(unet, dtype)
    if compiled:
        unet.compile_repeated_blocks(dynamic=False)
    torch.backends.cudnn.benchmark = True
    count, side = args.train_batch_size, args.resolution // pipe.vae_scale_factor
    pixels = torch.zeros(count, 3, args.resolution, args.resolution, dtype=torch.uint8, device=device)
    latents = torch.randn(count, 4, side, side, dtype=dtype, device=device)
    timesteps = torch.arange(count, device=device) * 20
    prompts = torch.randn(count, 77, unet.config.cross_attention_dim, dtype=dtype, device=device)

    def step():
        if vae:
            encode_pixels(pipe.vae, pixels)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            prediction = unet(latents, timesteps, prompts).sample
        prediction.float().square().mean().backward()

    return STEPS * count / seconds(lambda: [step() for _ in range(STEPS)], WINDOWS, device)


def limit_with_vae(argv: list[str]) -> float:
    return limit(argv, vae=True)


def limit_compiled(argv: list[str]) -> float:
    return limit(argv, compiled=True)


def loader_alone(argv: list[str]) -> float:
    """Return images/s of train_lora.py's workers, decoding."""
    args = train_lora.parse_args(argv)
    rows = training_pictures.read_rows(args)
    tokenizer = StableDiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path).tokenizer
    side = args.resolution // 8
    batches = training_pictures.TrainingBatches(rows, args, tokenizer, 1000, (4, side, side))
    times = []
    for _ in DataLoader(batches, batch_size=None, num_workers=args.dataloader_num_workers):
        times.append(time.perf_counter())
    return (len(times) - STEPS) * args.train_batch_size / (times[-1] - times[STEPS - 1])


if __name__ == "__main__":
    main(parse_args())
