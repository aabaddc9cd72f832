"""From prompts and seeds to pixels: the sampler that every stage and page uses, so the same seed is the same picture everywhere.

The steps are those of diffusers' StableDiffusionPipeline, of whose parts (`pipe`) they make use. Left out is what makes a GPU
wait: the scheduler counts on the CPU, the negative prompt is encoded once, and nothing is read back before the pixels are.
"""

import copy

import torch
from PIL import Image

# Pictures of together as many pixels (4 of 512 x 512) are decoded at a time: the VAE, not the UNet, needs the most memory.
DECODE_PIXELS = 2**20


def draw(
    pipe, prompts: list[str], seeds: list[int], negative_embeds, num_inference_steps: int, guidance_scale: float,
    height: int, width: int,
) -> torch.Tensor:  # fmt: skip
    """Return a picture a prompt, each from its own seed's noise: uint8 (n, height, width, 3), on the pipeline's device.

    `negative_embeds` (1 or n, tokens, width) is what `encode` makes of the negative prompt. If the pipeline has a safety
    checker, what it flags is black.
    """
    latents = sample(
        pipe, noise(pipe, seeds, height, width), encode(pipe, prompts), negative_embeds, num_inference_steps, guidance_scale
    )  # fmt: skip
    pixels = decode(pipe, latents)
    if pipe.safety_checker is not None:
        seen = pipe.feature_extractor(to_images(pixels), return_tensors="pt")
        # It blackens in place what it flags.
        pipe.safety_checker(clip_input=seen.pixel_values.to(pipe.device, pipe.dtype), images=pixels)
    return pixels


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """Return pictures, uint8 (n, height, width, 3), as PIL images."""
    return [Image.fromarray(array) for array in pixels.cpu().numpy()]


def noise(pipe, seeds: list[int], height: int, width: int) -> torch.Tensor:
    """Return the latents (n, channels, height / 8, width / 8) that pictures start from, each drawn from its own seed.

    float32, drawn on the CPU: the same on every device, at every precision, in every batch.
    """
    factor = pipe.vae_scale_factor
    shape = (1, pipe.unet.config.in_channels, height // factor, width // factor)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def encode(pipe, prompts: list[str]) -> torch.Tensor:
    """Return the prompts' embeddings (n, tokens, width); what is longer than the text encoder reads is cut off."""
    length = pipe.tokenizer.model_max_length
    tokens = pipe.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return pipe.text_encoder(to_device(tokens.input_ids, pipe.device))[0]


@torch.no_grad()
def sample(pipe, latents, embeds, negative_embeds, num_inference_steps: int, guidance_scale: float) -> torch.Tensor:
    """Denoise standard normal latents (n, channels, h, w) towards the prompts and away from the negative ones.

    `embeds` is (n, tokens, width), `negative_embeds` (1 or n, tokens, width). The latents stay float32 whatever the UNet's
    precision. Classifier-free guidance (Ho and Salimans, 2022) as in the paper; a scale of 1 or less switches it off.
    """
    scheduler = copy.deepcopy(pipe.scheduler)  # it has a state, which two threads must not share
    scheduler.set_timesteps(num_inference_steps, device="cpu")
    guided = guidance_scale > 1
    if guided:
        embeds = torch.cat([negative_embeds.expand_as(embeds), embeds])
    latents = to_device(latents, pipe.device) * scheduler.init_noise_sigma
    # The scheduler makes numbers of its timesteps, for which a GPU's would have to be waited for; the UNet gets copies.
    for t, t_unet in zip(scheduler.timesteps, to_device(scheduler.timesteps, pipe.device), strict=True):
        model_input = scheduler.scale_model_input(latents, t).to(pipe.unet.dtype)
        if guided:
            model_input = torch.cat([model_input, model_input])
        prediction = pipe.unet(model_input, t_unet, embeds, return_dict=False)[0].float()
        if guided:
            away, towards = prediction.chunk(2)
            prediction = away + guidance_scale * (towards - away)
        latents = scheduler.step(prediction, t, latents, return_dict=False)[0]
    return latents


@torch.no_grad()
def decode(pipe, latents: torch.Tensor) -> torch.Tensor:
    """Return the latents' pictures, uint8 (n, height, width, 3), on their device."""
    pixels = latents.shape[-2] * latents.shape[-1] * pipe.vae_scale_factor**2
    latents = (latents / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)
    pictures = []
    for few in latents.split(max(1, DECODE_PIXELS // pixels)):
        decoded = pipe.vae.decode(few, return_dict=False)[0].float()
        pictures.append(((decoded * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(pictures).permute(0, 2, 3, 1).contiguous()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to the device; to a GPU from pinned memory, so that nobody waits."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
