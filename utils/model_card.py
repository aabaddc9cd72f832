"""The model card of a LoRA, in the hub's form, and its upload."""

import json
from pathlib import Path

from utils import lora
from utils.errors import UserError
from utils.jsonl import write_whole


def write_model_card(output: Path, settings: dict, prompts: list[str], steps: int):
    """Write README.md: hub front matter, what the LoRA is and how to use it, the prompts and the last validation pictures."""
    base, prefix = settings["pretrained_model_name_or_path"], settings["negative_prefix"]
    grid = max((output / "validation").glob("step-*.png"), default=None)
    quote = json.dumps  # a JSON string is a YAML string
    front = ["license: creativeml-openrail-m", "library_name: diffusers"]
    # The hub refuses a card whose base model is none of its own.
    front += [] if Path(base).is_dir() else [f"base_model: {quote(base)}"]
    front += ["pipeline_tag: text-to-image", "inference: true", "tags:"]
    front += [f"- {tag}" for tag in ("text-to-image", "diffusers", "lora", "stable-diffusion")]
    if grid:
        front.append("widget:")
        for prompt in prompts:
            front += [f"- text: {quote(prompt, ensure_ascii=False)}", "  parameters:"]
            front += [f"    negative_prompt: {quote(prefix, ensure_ascii=False)}"]
            front += ["  output:", f"    url: validation/{grid.name}"]
    body = [
        f"# LoRA of {base}, aligned with human preference",
        "Trained as in [Better Aligning Text-to-Image Models with Human Preference](https://arxiv.org/abs/2303.14420) "
        f"(Wu et al., ICCV 2023): the pictures that people like least were learned under the words `{prefix}`. "
        "**Use these words as negative prompt**; that is part of the method.",
        "```python\nfrom diffusers import StableDiffusionPipeline\n\n"
        f"pipe = StableDiffusionPipeline.from_pretrained({quote(base)})\n"
        f'pipe.load_lora_weights("path/to/this/folder")\n'
        f'image = pipe("your prompt", negative_prompt={quote(prefix, ensure_ascii=False)}).images[0]\n```',
        f"{steps} steps of {settings['global_batch']} pictures "
        f"({settings['annotation_file'].split(',')[0]} of the best and worst, "
        f"{settings['regularization_annotation'].split(',')[0]} for regularization), rank {settings['lora_rank']}, "
        f"learning rate {settings['learning_rate']}, {settings['resolution']} px, seed {settings['seed']}. "
        "All options are in `run.json`.",
    ]
    if grid:
        body.append(
            f"![plain above, with the prefix in the middle, with it as negative prompt below](validation/{grid.name})"
        )
        body.append("\n".join(f"- {prompt}" for prompt in prompts))
    write_whole(output / "README.md", "\n".join(["---", *front, "---", "", "\n\n".join(body), ""]))


def create_repository(output: Path, name: str | None) -> str:
    """Return the full name of the repository on the hub, made if it is missing; UserError if the hub refuses."""
    from huggingface_hub import HfApi

    try:
        return HfApi().create_repo(name or output.resolve().name, exist_ok=True).repo_id
    except Exception as error:  # the hub's client and its HTTP library have many kinds
        raise UserError(f"--push_to_hub: {on_one_line(error)}") from None


def push_to_hub(output: Path, repository: str):
    """Upload the LoRA, its card, run.json and the last validation pictures; UserError if the hub refuses."""
    from huggingface_hub import HfApi

    grid = max((output / "validation").glob("step-*.png"), default=None)
    files = [lora.FILE_NAMES[0], "README.md", "run.json"] + ([f"validation/{grid.name}"] if grid else [])
    try:
        done = HfApi().upload_folder(repo_id=repository, folder_path=output, allow_patterns=files)
    except Exception as error:
        raise UserError(
            f"--push_to_hub: {on_one_line(error)}; the LoRA is in {output}, the same command tries again"
        ) from None
    print(f"uploaded to {done.repo_url}")


def on_one_line(error: Exception) -> str:
    """Return what the error says; the hub's reason stands below its first line."""
    return " ".join(str(error).split()) or type(error).__name__
