"""A record beside every output: resolved options, versions, checksums, counts, time. Output of other settings is refused."""

import hashlib
import importlib.metadata
import json
import platform
import time
from pathlib import Path

from utils.errors import UserError
from utils.jsonl import write_whole

PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "accelerate", "open_clip_torch", "peft", "pillow")


def begin(path: str | Path, settings: dict, overwrite: bool = False) -> dict:
    """Record the settings that an output depends on, before its first byte is written; return the record.

    If the record is there already, the same settings mean "go on"; others raise UserError naming the options that
    differ, unless `overwrite`, which starts a new record (the caller removes the old output).
    """
    path = Path(path)
    settings = json.loads(json.dumps(settings, default=str))
    if path.exists() and not overwrite:
        try:
            record = json.loads(path.read_text())
            old = record["settings"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: not a run record; remove it, or pass --overwrite to start anew") from None
        differing = [k for k in {**old, **settings} if old.get(k) != settings.get(k)]
        if differing:
            said = "; ".join(f"{k} was {old.get(k)!r}, now {settings.get(k)!r}" for k in differing)
            raise UserError(
                f"{path}: the output there was made with other settings ({said}); use --overwrite or another place"
            )
        return record
    record = {"settings": settings, "started": time.strftime("%Y-%m-%d %H:%M:%S"), "versions": versions()}
    write_whole(path, json.dumps(record, indent=2) + "\n")
    return record


def finish(path: str | Path, record: dict, **results):
    """Add results (counts, seconds, scores) to a record."""
    record.update(results, finished=time.strftime("%Y-%m-%d %H:%M:%S"))
    write_whole(path, json.dumps(record, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
