"""Small parts of DiffusionDB and a small classifier, for the tests of the stages that read them."""

import io
import json
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image, ImageFilter

from toy import world

CONFIG = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}


def encode(image: Image.Image, kind: str = "WEBP", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({"lossless": True} if kind == "WEBP" else {}) | options)
    return file.getvalue()


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def write_part(folder: Path, number: int, entries: list[tuple[str, str, bytes]]) -> Path:
    """Write one part zip of (image, prompt, content)."""
    index = {
        image: {"p": prompt, "se": i, "c": 7.0, "st": 50, "sa": "k_lms"} for i, (image, prompt, _) in enumerate(entries)
    }
    members = {image: content for image, _, content in entries}
    return write_zip(
        folder / f"part-{number:06d}.zip", {f"part-{number:06d}.json": json.dumps(index).encode()} | members
    )


def write_parts(folder: Path, numbers=(2, 3, 4), prompts: int = 3, images: int = 5, seed: int = 0) -> Path:
    """Write parts of pictures that the toy world renders; in each, one is blurred and one does not decode."""
    for number in numbers:
        rng = np.random.default_rng([seed, number])
        entries = []
        for prompt in rng.choice(world.prompts(), prompts).tolist():
            for _ in range(images):
                picture = world.render(prompt, rng, deformed=bool(rng.integers(2)))
                entries.append((f"{rng.bytes(8).hex()}.webp", prompt, encode(picture)))
        name, prompt, content = entries[1]
        blurred = Image.open(io.BytesIO(content)).resize((64, 64)).filter(ImageFilter.GaussianBlur(16))
        entries[1] = (name, prompt, encode(blurred))
        entries[2] = (entries[2][0], entries[2][1], entries[2][2][:60])
        write_part(folder, number, entries)
    return folder


@cache
def checkpoint_bytes(seed: int) -> bytes:
    from utils import hps

    torch.manual_seed(seed)
    model = open_clip.create_model(hps.find_model(CONFIG)[0])
    file = io.BytesIO()
    torch.save({"state_dict": model.state_dict(), "model": CONFIG}, file)
    return file.getvalue()


def write_checkpoint(path: Path, seed: int = 0) -> Path:
    """Write a classifier of random weights."""
    path.write_bytes(checkpoint_bytes(seed))
    return path


def read_rows(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().split("\n")[:-1]]


def write_rows(path, rows) -> Path:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path(path)
