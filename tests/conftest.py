"""What several tests use: a small world made by toy/make_data.py with the real toy models."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from toy import make_data

SD = str(make_data.MODEL)
CLIP = ["--model", str(make_data.MODEL.parent / "clip.json")]


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    """A folder as `python -m toy.make_data` writes it: 16 + 8 prompts with choices, two parts, a web of 24 pictures."""
    folder = tmp_path_factory.mktemp("world")
    sizes = "--train_prompts 16 --test_prompts 8 --part_prompts 5 --web_pictures 24 --evaluation_prompts 6"
    make_data.main(
        make_data.parse_args(
            ["--output", str(folder), "--num_inference_steps", "6", "--batch_size", "32", *sizes.split()]
        )
    )
    return folder
