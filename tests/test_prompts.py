"""Prompt files of every kind give the same prompts; what is none is named with its file and line."""

import json

import pytest

from utils import prompts
from utils.errors import UserError

PROMPTS = ["a cat, by \"someone\"", "[cat|dog] in the rain", "{x}", 'a "quote" 猫 \u2028 end']  # fmt: skip
ARRAY = json.dumps(PROMPTS)
ROWS = [json.dumps({"prompt": prompt, "seed": 3}) for prompt in PROMPTS]
TEXT = "\n".join(PROMPTS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.json", ARRAY),
        ("p.json", f"[{','.join(ROWS)}]"),
        ("meta.json", json.dumps([{"file_name": f"{i}.jpg", "caption": p} for i, p in enumerate(PROMPTS)], indent=1)),
        ("p.jsonl", "\n".join(ROWS)),
        ("p.jsonl", "\n".join(json.dumps(prompt) for prompt in PROMPTS) + "\n\n"),
        ("p.txt", TEXT),
        ("p.txt", "\ufeff" + TEXT.replace("\n", "\r\n\r\n")),
        ("prompts", ARRAY),
        ("prompts", "\n".join(ROWS)),
        ("prompts", TEXT),
    ],
)
def test_every_kind_of_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    assert prompts.read(tmp_path / name) == PROMPTS


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.json", b'["fine", 3]', "element 1: expected a string, found 3"),
        ("p.json", b'["fine", {"text": "x"}]', "element 1: no field 'prompt' .it has 'text'"),
        ("p.json", b'{"prompt": "x"}', "expected an array of prompts, found dict"),
        ("p.json", b"a cat", "not valid JSON"),
        ("p.json", b"[]", "no prompts in it"),
        ("p.json", b'["\\ud83d"]', "element 0: half of a surrogate pair"),
        ("p.jsonl", b'"fine"\n\n{"prompt": 3}', "line 3: expected a string, found 3"),
        ("p.jsonl", b'"fine"\nx\n', "line 2: not valid JSON"),
        ("p.txt", b"fine\n\xff\n", "line 2: not UTF-8"),
        ("p.txt", b"\n \n", "no prompts in it"),
        ("p", b"[cat|dog]", "not valid JSON.*goes by .txt"),
    ],
)
def test_mistakes_are_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: {said}"):
        prompts.read(tmp_path / name)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        prompts.read(tmp_path)
