"""Prompts from files of every kind in use: a JSON array, JSON Lines, or plain text with a prompt a line."""

import json
from pathlib import Path

from utils.errors import UserError


def read(path: str | Path) -> list[str]:
    """Return the prompts of a file, in its order; UserError naming the file and the line or element if one is none.

    .txt      a prompt a line; empty lines are passed over
    .json     an array of strings, as the original's, or of objects with "prompt" (or "caption", as in meta.json)
    .jsonl    a string or such an object a line
    Under another name the first character tells: [ an array, { or " JSON Lines, anything else plain text.
    """
    path = Path(path)
    text = read_text(path)
    first, suffix = text.lstrip()[:1], path.suffix.lower()
    if suffix == ".json" or (suffix not in (".txt", ".jsonl") and first == "["):
        values = parse(text, f"{path}")
        if not isinstance(values, list):
            raise UserError(f"{path}: expected an array of prompts, found {type(values).__name__}")
        found = [(f"{path}: element {i}", value) for i, value in enumerate(values)]
    else:
        # Not splitlines: a prompt may hold a line separator that only Unicode knows.
        lines = [(f"{path}: line {i}", line.strip()) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        if suffix == ".jsonl" or (suffix != ".txt" and first in ("{", '"')):
            lines = [(where, parse(line, where)) for where, line in lines]
        found = lines
    if not found:
        raise UserError(f"{path}: no prompts in it")
    return [prompt(value, where) for where, value in found]


def prompt(value, where: str) -> str:
    """Return the prompt that an element of a file is or holds."""
    if isinstance(value, dict):
        name = "prompt" if "prompt" in value else "caption"
        if name not in value:
            raise UserError(f"{where}: no field 'prompt' (it has {', '.join(map(repr, value)) or 'none'})")
        value = value[name]
    if not isinstance(value, str):
        raise UserError(f"{where}: expected a string, found {value!r}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{where}: half of a surrogate pair, no character: {value!r}")
    return value


def parse(text: str, where: str):
    """Return the JSON value in a text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON: {error} (plain text, a prompt a line, goes by .txt)") from None


def read_text(path: Path) -> str:
    """Return a file's text, which must be UTF-8: a prompt with a letter replaced would be another prompt."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: line {line}: not UTF-8") from None
