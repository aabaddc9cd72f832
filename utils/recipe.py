"""A picture's recipe in the form that AUTOMATIC1111's "PNG info" shows and its users' tools read.

    the prompt
    Negative prompt: what to steer away from
    Steps: 50, Sampler: PLMS, CFG scale: 7.5, Seed: 0, Size: 512x512, Model: stable-diffusion-v1-4, ...

It stands in a PNG's text "parameters", and in the EXIF field UserComment of a JPEG or WebP. In the last line a value with a
comma, colon or line break is written as a JSON string.
"""

import hashlib
import json
import struct
from pathlib import Path

from PIL.PngImagePlugin import PngInfo

EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
LONG, UNDEFINED = 4, 7  # EXIF's names for types of fields
# Bytes of UTF-16, as a JPEG holds 64 KB of EXIF; the text encoder reads some hundred of them.
MAX_PROMPT, MAX_NEGATIVE_PROMPT = 40_000, 20_000


def text(prompt: str, negative_prompt: str, fields: dict) -> str:
    """Return the recipe; fields that are None are left out."""
    lines = [cut(prompt, MAX_PROMPT)]
    if negative_prompt:
        lines.append(f"Negative prompt: {cut(negative_prompt, MAX_NEGATIVE_PROMPT)}")
    lines.append(", ".join(f"{name}: {quote(value)}" for name, value in fields.items() if value is not None))
    return "\n".join(lines)


def cut(text: str, size: int) -> str:
    return text.encode("utf-16-be")[:size].decode("utf-16-be", "ignore")


def quote(value) -> str:
    value = str(value)
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ',:\n"') else value


def save_options(recipe: str, file_format: str) -> dict:
    """Return what Pillow's `save` needs to put the recipe into a file of this format (PNG, JPEG, WEBP)."""
    if file_format == "PNG":
        info = PngInfo()
        info.add_itxt("parameters", recipe)
        return {"pnginfo": info}
    # EXIF's own name for the encoding is UNICODE; readers of these recipes take it for UTF-16, big end first.
    return {"exif": exif(b"UNICODE\0" + recipe.encode("utf-16-be"))}


def exif(comment: bytes) -> bytes:
    """Return an EXIF block with a UserComment and nothing else.

    Pillow would give the field another type (BYTE), at which the library that AUTOMATIC1111 reads it with fails.
    """
    # A TIFF of two tables of one entry each: the first, at byte 8, says where the second is, that one where the comment is.
    tables = struct.pack(">HHHIII", 1, EXIF_IFD, LONG, 1, 26, 0)
    tables += struct.pack(">HHHIII", 1, USER_COMMENT, UNDEFINED, len(comment), 44, 0)
    return b"Exif\0\0" + b"MM\0*" + struct.pack(">I", 8) + tables + comment


def lora_hash(path: str | Path) -> str:
    """Return the 12 digits by which AUTOMATIC1111 knows a LoRA: SHA-256 of the file, of a .safetensors without its header."""
    content = Path(path).read_bytes()
    if Path(path).suffix == ".safetensors":
        content = content[8 + int.from_bytes(content[:8], "little") :]
    return hashlib.sha256(content).hexdigest()[:12]
