"""Full-size models built from their published configs with random weights: their speed, memory and format are the real ones."""

import gzip
from pathlib import Path

import open_clip
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

# CompVis/stable-diffusion-v1-4
UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}  # the rest are diffusers' defaults
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "bos_token_id": 49406,  # transformers' defaults for these two are not what CLIP's tokenizer gives
    "eos_token_id": 49407,
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def unet(seed: int = 0) -> UNet2DConditionModel:
    """Return SD 1.4's UNet, 860 million random weights."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(**UNET)


def tokenizer() -> CLIPTokenizer:
    """Return CLIP's whole tokenizer, from the vocabulary in open_clip's package."""
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    encoder = open_clip.tokenizer.SimpleTokenizer().encoder
    vocabulary = {names.get(token, token): number for token, number in encoder.items()}
    path = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.open(path).read().decode().split("\n")[1:48895]
    return CLIPTokenizer(vocab=vocabulary, merges=[tuple(line.split()) for line in lines], model_max_length=77)


def stable_diffusion(seed: int = 0) -> StableDiffusionPipeline:
    """Return a StableDiffusionPipeline of SD 1.4's sizes, fp32, 1.07 billion random weights, without a safety checker."""
    model = unet(seed)
    return StableDiffusionPipeline(
        unet=model,
        vae=AutoencoderKL(**VAE),
        text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)),
        tokenizer=tokenizer(),
        scheduler=PNDMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
