"""How fast prompts become a folder of pictures with a LoRA: the original's loop, ours, and the limit.

    python -m benchmarks.generation             # a GPU: SD 1.4's size, 512 px, 50 steps; a CPU: the toy model, and SD 1.4's size small
    python -m benchmarks.generation --compile   # ours and the limit with the UNet compiled

plain   the original's loop: a prompt a call, LoRA layers beside the weights, half precision on a GPU, the pipeline as it comes
ours    generate_images.py from the loaded pipeline to the last written file
limit   the same UNet's forwards alone at ours' batch size, both halves of the guidance, and the VAE's decode, on tensors that are there

PNDM calls the UNet once more than it has steps; each of the three does. Weights are random at full size, and so are the LoRA's.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

import generate_images
from benchmarks import full_size, tables
from utils import lora, pipeline, sampling

TOY = Path(__file__).parent.parent / "toy" / "models" / "stable-diffusion"
PROMPT = "a portrait of a red circle on a white background, oil painting, number"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["toy", "full"], help="default: full on a GPU, both on a CPU")
    parser.add_argument("--batch_size", type=int, help="of ours and the limit")
    parser.add_argument("--num_inference_steps", type=int)
    parser.add_argument("--size", type=int, help="pixels")
    parser.add_argument("--pictures", type=int, help="of ours; the plain loop is timed on fewer")
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], help="default: fp16 on a GPU, fp32 on a CPU")
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args()


def main(args):
    gpu = torch.cuda.is_available()
    for model in [args.model] if args.model else ["full"] if gpu else ["toy", "full"]:
        # On a CPU a picture of SD 1.4 at 512 px and 50 steps takes a quarter of an hour.
        defaults = {"batch_size": 16, "num_inference_steps": 50, "size": 512, "pictures": 64}
        if model == "toy":
            defaults = {"batch_size": 32, "num_inference_steps": 20, "size": 32, "pictures": 192}
        elif not gpu:
            defaults = {"batch_size": 1, "num_inference_steps": 2, "size": 256, "pictures": 1}
        settings = {name: getattr(args, name) or value for name, value in defaults.items()}
        settings["precision"] = args.precision or ("fp16" if gpu else "fp32")
        rows = []
        for what, function in (
            ("plain: a prompt a call, LoRA unfused", plain),
            ("ours: generate_images.py", ours),
            ("limit: the UNet and the VAE alone", limit),
        ):
            speed, peak = tables.apart(function, model, settings, args.compile and function is not plain)
            rows.append({"what": what, "speed": speed, "peak_gib": peak})
        name = "generation" + ("_toy" if model == "toy" else "") + ("_compiled" if args.compile else "")
        tables.report(name, rows, **settings)


def plain(model: str, settings: dict, compiled: bool) -> float:
    """Return the pictures a second of the original's loop."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load(model)
    lora.attach(pipe.unet, random_lora(pipe.unet))
    pipe.to(device, {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[settings["precision"]])
    pipe.set_progress_bar_config(disable=True)
    count = max(1, min(8, settings["pictures"] // 4))

    def loop():
        with tempfile.TemporaryDirectory() as folder:
            for i in range(count):
                image = pipe(
                    f"{PROMPT} {i}", negative_prompt="Weird image. ", height=settings["size"], width=settings["size"],
                    num_inference_steps=settings["num_inference_steps"], generator=torch.Generator(device).manual_seed(i),
                ).images[0]  # fmt: skip
                image.save(f"{folder}/{i}.jpg", quality=90)

    return count / tables.seconds(loop, repeats(model), device)


def ours(model: str, settings: dict, compiled: bool) -> float:
    """Return the pictures a second of generate_images.py, files and recipes included."""
    args, pipe = our_pipeline(model, settings, compiled)
    pictures = generate_images.plan(args, [f"{PROMPT} {i}" for i in range(settings["pictures"])])

    def generate():
        with tempfile.TemporaryDirectory() as folder:
            generate_images.generate_files(args, pipe, pictures, Path(folder))

    return len(pictures) / tables.seconds(generate, repeats(model), pipe.device.type)


def limit(model: str, settings: dict, compiled: bool) -> float:
    """Return the pictures a second of nothing but the networks."""
    _, pipe = our_pipeline(model, settings, compiled)
    count, factor = settings["batch_size"], pipe.vae_scale_factor
    batches = max(settings["pictures"] // count, 1)
    latents = torch.randn(count, 4, settings["size"] // factor, settings["size"] // factor, device=pipe.device)
    doubled = torch.cat([latents, latents]).to(pipe.unet.dtype)
    embeds = sampling.encode(pipe, [PROMPT] * 2 * count)
    timestep = torch.tensor(500, device=pipe.device)

    @torch.no_grad()
    def networks():
        for _ in range(batches):
            for _ in range(settings["num_inference_steps"] + 1):
                pipe.unet(doubled, timestep, embeds, return_dict=False)
            for few in latents.to(pipe.vae.dtype).split(max(1, sampling.DECODE_PIXELS // settings["size"] ** 2)):
                pipe.vae.decode(few, return_dict=False)

    return batches * count / tables.seconds(networks, repeats(model), pipe.device.type)


def repeats(model: str) -> int:
    return 2 if model == "full" and not torch.cuda.is_available() else 3


def our_pipeline(model: str, settings: dict, compiled: bool):
    """Return generate_images.py's options and its pipeline, the LoRA fused."""
    options = ["--pretrained_model_name_or_path", str(TOY), "--compile"][: 3 if compiled else 2]
    for name in ("batch_size", "num_inference_steps", "precision"):
        options += [f"--{name}", str(settings[name])]
    torch.backends.cudnn.benchmark = True
    args = generate_images.parse_args([*options, "--height", str(settings["size"]), "--width", str(settings["size"])])
    pipe = load(model)
    lora.fuse(pipe.unet, random_lora(pipe.unet))
    return args, pipeline.place(pipe, args.device, args.precision, args.compile)


def load(model: str):
    """Return the pipeline as it comes."""
    return (
        full_size.stable_diffusion()
        if model == "full"
        else StableDiffusionPipeline.from_pretrained(TOY, dtype=torch.float32)
    )


def random_lora(unet, rank: int = 4) -> dict[str, lora.Matrices]:
    """Return a LoRA of random matrices for every attention's projections."""
    found = {}
    for name, module in unet.named_modules():
        if name.endswith(tuple(lora.TARGET_MODULES)):
            down, up = torch.randn(rank, module.in_features) / 100, torch.randn(module.out_features, rank) / 100
            found[name.replace(".", "_")] = lora.Matrices(down, up, rank)
    return found


if __name__ == "__main__":
    main(parse_args())
