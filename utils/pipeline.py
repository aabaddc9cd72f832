"""Stable Diffusion's pipeline, loaded and put where it draws fastest; utils/sampling.py draws with it."""

from utils import ranks
from utils.errors import UserError

# diffusers' class, what it needs beside the model's own configuration, and AUTOMATIC1111's name for the sampler.
SCHEDULERS = {
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}, "PLMS"),
    "ddim": ("DDIMScheduler", {"clip_sample": False}, "DDIM"),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {}, "DPM++ 2M"),
    "euler": ("EulerDiscreteScheduler", {}, "Euler"),
}


def load(model: str, scheduler: str = "pndm", safety_checker: bool = False):
    """Return the pipeline of a folder or of the hub, on the CPU in fp32; UserError if there is none.

    A LoRA is smaller than the last digits of half-precision weights, so it is added now, before `place` rounds them.
    """
    import diffusers
    import torch

    kept = {} if safety_checker else {"safety_checker": None, "requires_safety_checker": False}
    try:
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32, **kept)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--pretrained_model_name_or_path {model}: {reason}") from None
    if safety_checker and pipe.safety_checker is None:
        raise UserError(f"--safety_checker: {model} has none")
    kind, options, _ = SCHEDULERS[scheduler]
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **options)
    return pipe


def place(pipe, device: str | None = None, precision: str | None = None, compile_unet: bool = False):
    """Move the pipeline to a device, in the precision and memory layout it is fastest in, and return it.

    Without a name the device is `ranks.device`'s; without a precision it is `pick_precision`'s.
    """
    import torch

    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[pick_precision(precision, device)]
    device = ranks.device(device)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, device, dtype)  # diffusers' own `to` warns of nothing here
    # Convolutions want the channels last, on GPUs' tensor cores and on CPUs.
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    if compile_unet:
        pipe.unet.compile(fullgraph=True, dynamic=False)
    return pipe


def pick_precision(precision: str | None, device: str | None) -> str:
    """Return the given precision, else fp16 on a GPU and fp32 on the CPU."""
    return precision or ("fp32" if ranks.device(device).type == "cpu" else "fp16")


def side(pipe) -> int:
    """Return the side of the square pictures that the model was trained for, in pixels."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor
