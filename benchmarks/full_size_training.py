"""LoRA training at Stable Diffusion 1.4's full size: two steps really taken, and how much memory a batch needs.

    python -m benchmarks.full_size_training             # computes the memory table (no weights, a minute or two)
    python -m benchmarks.full_size_training --two_steps # also trains two steps at 512 px, batch 1, and draws with the LoRA

The memory is computed: every allocation of one training step (VAE, text encoder, UNet's forward and backward, AdamW) is
followed on tensors without data, with attention as flash attention saves it. What a library takes beside its tensors
(CUDA's context, cuDNN's workspaces, fragmentation; 1 to 2 GiB) comes on top. With --two_steps the same count stands
beside the measured peak of the real process. On a GPU the peaks are measured as well, with --mixed_precision bf16.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from diffusers.utils import logging
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary
from transformers import CLIPTextConfig, CLIPTextModel

import train_lora
from benchmarks import full_size
from benchmarks.tables import RESULTS, apart, device_name
from benchmarks.training import ours, write_pictures
from utils import lora
from utils.jsonl import write_whole
from utils.latents import encode_pixels


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--two_steps", action="store_true", help="train and draw for real: 3 minutes, 8 GiB of memory")
    return parser.parse_args(argv)


def main(args):
    logging.set_verbosity_error()  # that a model on no device is cast
    rows = []
    for checkpointing in (False, True):
        for cached in (False, True):
            small, large = (step_memory(batch, torch.bfloat16, checkpointing, cached) for batch in (2, 4))
            slope = (large - small) / 2
            fits = int((24 - 1.5 - small) / slope) + 2  # 1.5 GiB for what is not counted
            rows.append(
                {
                    "gradient_checkpointing": checkpointing,
                    "latents_cached": cached,
                    "batch_40_gib": small + 38 * slope,
                    "largest_batch_in_24_gib": fits,
                }
            )
    print("\nmemory of a training step at 512 px, bf16, computed")
    print(f"{'':50s}{'batch 40, GiB':>16s}{'largest in 24 GiB':>20s}")
    for row in rows:
        what = f"checkpointing {row['gradient_checkpointing']!s:6s} latents cached {row['latents_cached']}"
        print(f"{what:50s}{row['batch_40_gib']:16.1f}{row['largest_batch_in_24_gib']:20d}")
    result = {"date": time.strftime("%Y-%m-%d"), "device": device_name(), "computed": rows}
    if torch.cuda.is_available():
        result["measured"] = measured_on_gpu(rows)
    if args.two_steps:
        result["two_steps"] = two_steps()
        result["two_steps"]["computed_gib"] = step_memory(1, torch.float32, False, False)
        print("two steps on the CPU:", json.dumps(result["two_steps"], indent=2))
    RESULTS.mkdir(exist_ok=True)
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    write_whole(RESULTS / f"full_size_training.{kind}.json", json.dumps(result, indent=2) + "\n")


class Peak(TorchDispatchMode):
    """Follow the memory of every tensor that an operator returns, until it is freed."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = WeakIdKeyDictionary()

    def note(self, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        if storage in self.seen:
            return
        size = storage.nbytes()
        self.seen[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, size)

    def free(self, size: int):
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor)
        return result


def step_memory(batch: int, dtype, checkpointing: bool, cached: bool) -> float:
    """Return the peak of one training step at 512 px in GiB, counted on tensors without data."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**full_size.UNET)
        vae = AutoencoderKL(**full_size.VAE)
        text_encoder = CLIPTextModel(CLIPTextConfig(**full_size.TEXT))
        for part in (unet, vae, text_encoder):
            part.requires_grad_(False).to(dtype)
        unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=lora.TARGET_MODULES))
        cast_training_params(unet, torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True), Peak() as memory:
        for part in (unet, vae, text_encoder):
            part.to_empty(device="cpu")
        train_lora.make_lean(unet, dtype)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.train()
        parameters = [p for p in unet.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, fused=True)
        memory.peak = memory.now
        for _ in range(2):
            pixels = torch.zeros(batch, 3, 512, 512, dtype=torch.uint8)
            if not cached:
                encode_pixels(vae, pixels)
            with torch.no_grad():
                prompts = text_encoder(torch.zeros(batch, 77, dtype=torch.long))[0]
            latents = torch.zeros(batch, 4, 64, 64)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                prediction = unet(latents.to(dtype), torch.zeros(batch, dtype=torch.long), prompts).sample
            (prediction.float() - latents).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return memory.peak / 2**30


def two_steps() -> dict:
    """Train two steps at 512 px with random weights as a user would, and draw a picture with what comes out."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        apart(save_model, folder / "model")
        write_pictures(folder, 4, 512)
        train = (
            f"train_lora.py --pretrained_model_name_or_path {folder}/model --annotation_file {folder}/annotation.jsonl "
            f"--resolution 512 --train_batch_size 1 --max_train_steps 2 --output_dir {folder}/lora --report_to none "
            "--mixed_precision no --cpu --dataloader_num_workers 0 --logging_steps 1"
        )
        draw = (
            f"generate_images.py --pretrained_model_name_or_path {folder}/model --unet_weight {folder}/lora "
            f"--prompts {folder}/prompts.json --folder {folder}/output --num_inference_steps 1 --device cpu"
        )
        (folder / "prompts.json").write_text('["a red circle"]')
        found = {}
        for name, command in (("train", train), ("generate", draw)):
            start = time.perf_counter()
            subprocess.run([sys.executable, *command.split()], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
            found[f"{name}_seconds"] = round(time.perf_counter() - start, 1)
        rows = [json.loads(line) for line in open(folder / "lora" / "log.jsonl")]
        found |= {"seconds_a_step": [1 / row["images_per_second"] for row in rows], "losses": [r["loss"] for r in rows]}
        found["train_peak_gib"] = rows[-1]["memory_gib"]
        found["lora_modules"] = len(lora.read(folder / "lora"))
        found["picture_bytes"] = (folder / "output" / "0.jpg").stat().st_size
        return found


def save_model(path: Path):
    full_size.stable_diffusion().to(torch.float16).save_pretrained(path)


def measured_on_gpu(computed: list[dict]) -> list[dict]:
    """Return the peaks of train_lora.py itself at batch 40 and at the batches that were computed to fit 24 GiB."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        apart(save_model, folder / "model")
        write_pictures(folder, 80, 512)
        for row in computed:
            for batch in (40, row["largest_batch_in_24_gib"]):
                options = (
                    f"--pretrained_model_name_or_path {folder}/model --annotation_file {folder}/annotation.jsonl "
                    f"--output_dir {folder}/{len(found)} --train_batch_size {batch} --max_train_steps 3 --logging_steps 1 "
                    "--report_to none --mixed_precision bf16"
                ).split()
                options += ["--gradient_checkpointing"] * row["gradient_checkpointing"]
                options += ["--cache_latents", f"{folder}/latents"] * row["latents_cached"]
                speed, peak = apart(ours, options)
                found.append(row | {"batch": batch, "peak_gib": peak, "images_per_second": speed})
                print("measured:", json.dumps(found[-1]), flush=True)
    return found


if __name__ == "__main__":
    main(parse_args())
