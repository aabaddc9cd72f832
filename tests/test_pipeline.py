"""Every stage in order on a small world, each reading what the one before it wrote, and the mistakes every script must name."""

import functools
import http.server
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import CLIP, SD
from PIL import Image

import download_regularization_images
import evaluate_hps
import evaluate_preference
import generate_images
import process_diffusiondb
import select_training_images
import train_hpc
import train_lora
from toy import judge, make_data, world

STAGES = sorted(path.stem for path in Path().glob("*.py"))


def call(stage, *options):
    stage.main(stage.parse_args([str(option) for option in options]))


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def web(small_world):
    """Serve the small world's pictures; return a table with the server's real port."""
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(small_world / "web"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    table = small_world / "served.jsonl"
    table.write_text((small_world / "urls.jsonl").read_text().replace(":8473/", f":{server.server_port}/"))
    yield table
    server.shutdown()


def test_from_choices_to_a_judged_model(small_world, web, tmp_path):
    out = tmp_path
    folder = out / "regularization_images"
    call(
        download_regularization_images, "--urls", web, "--output_folder", folder, "--min_size", 32, "--image_size", 32,
        "--allow_private", "--num_workers", 4,
    )  # fmt: skip
    expected = 0
    for line in web.read_text().splitlines():
        row = json.loads(line)
        expected += row["AESTHETIC_SCORE"] >= 6.5 and (small_world / "web" / Path(row["URL"]).name).exists()
    downloaded = [json.loads(line) for line in (out / "regularization_images.jsonl").read_text().splitlines()]
    assert len(downloaded) == expected > 10

    call(
        train_hpc, "--dataset_folder", small_world / "dataset", "--output", out / "hpc.pth", *CLIP, "--pretrained",
        make_data.MODEL.parent / "clip.safetensors", "--unlocked_image_layers", 4, "--unlocked_text_layers", 2,
        "--learning_rate", 1e-3, "--num_train_epochs", 4, "--num_workers", 0, "--cpu",
    )  # fmt: skip
    call(
        evaluate_preference, "--hpc", out / "hpc.pth", *CLIP, "--pretrained", make_data.MODEL.parent / "clip.safetensors",
        "--dataset_folder", small_world / "dataset", "--output", out / "preference.jsonl", "--num_workers", 0,
        "--device", "cpu",
    )  # fmt: skip
    call(
        process_diffusiondb, "--clip_checkpoint", out / "hpc.pth", "--source_dataset", small_world / "diffusiondb",
        "--meta_file", out / "meta.jsonl", "--num_workers", 0, "--device", "cpu",
    )  # fmt: skip
    meta = [json.loads(line) for line in (out / "meta.jsonl").read_text().splitlines()]
    assert len(meta) == 2 * (5 * 5 - 1)
    call(
        select_training_images, "--positive_folder", f"{out}/positive/", "--negative_folder", f"{out}/negative/",
        "--meta_file", out / "meta.jsonl", "--output_meta", out / "annotation.jsonl", "--threshold", 1.01,
    )  # fmt: skip
    chosen = [json.loads(line) for line in (out / "annotation.jsonl").read_text().splitlines()]
    assert {row["type"] for row in chosen} == {"positive", "negative"}
    call(
        train_lora, "--pretrained_model_name_or_path", SD, "--annotation_file", out / "annotation.jsonl",
        "--regularization_annotation", out / "regularization_images.jsonl", "--resolution", 32, "--train_batch_size", 4,
        "--max_train_steps", 2, "--output_dir", out / "lora", "--dataloader_num_workers", 0, "--cpu", "--report_to", "none",
    )  # fmt: skip
    record = json.loads((out / "lora" / "run.json").read_text())
    assert record["pictures"] == len(chosen) + len(downloaded)

    for row, lora, negative in (
        ("base", "", ""), ("base_negative", "", "Weird image. "),
        ("adapted", out / "lora", ""), ("adapted_negative", out / "lora", "Weird image. "),
    ):  # fmt: skip
        images = out / "images" / row
        call(
            generate_images, "--pretrained_model_name_or_path", SD, "--unet_weight", lora, "--prompts",
            small_world / "prompts.json", "--folder", images, "--negative_prompt", negative,
            "--num_inference_steps", 4, "--guidance_scale", 3, "--device", "cpu",
        )  # fmt: skip
        call(
            evaluate_hps, "--hpc", out / "hpc.pth", "--image_folder", images, "--meta_file", images / "meta.json",
            "--output", images.with_suffix(".jsonl"), "--num_workers", 0, "--device", "cpu",
        )  # fmt: skip
    (out / "seconds.tsv").write_text("world\t3\nworld\t1\ndownload\t2\n")
    call(judge, "--output", out, "--shown", 6, "--seed", 5)

    # The summary's numbers, counted again by hand.
    summary = json.loads((out / "summary.json").read_text())
    prompts = json.loads((small_world / "prompts.json").read_text())

    def humans(row):
        return np.array(
            [world.human_score(Image.open(out / "images" / row / f"{i}.jpg"), p) for i, p in enumerate(prompts)]
        )

    def scores(row):
        return np.array(
            [json.loads(line)["score"] for line in (out / "images" / f"{row}.jsonl").read_text().splitlines()]
        )

    assert summary["base"]["human_mean"] == pytest.approx(humans("base").mean())
    assert summary["adapted_negative"]["hps_mean"] == pytest.approx(scores("adapted_negative").mean())
    assert summary["base"]["n"] == 6 and summary["seed"] == 5 and summary["seconds"] == {"world": 3, "download": 2}
    difference = humans("adapted_negative") - humans("base")
    assert summary["paired"]["human_mean"] == pytest.approx(difference.mean())
    assert summary["paired"]["human_se"] == pytest.approx(difference.std(ddof=1) / 6**0.5)
    difference = scores("adapted_negative") - scores("base")
    assert summary["paired"]["hps_se"] == pytest.approx(difference.std(ddof=1) / 6**0.5)
    choices, right = json.loads((small_world / "dataset" / "preference_test.json").read_text()), 0
    for row in choices:
        images = [Image.open(small_world / "dataset" / "preference_images" / name) for name in row["file_path"]]
        liked = [world.human_score(image, row["prompt"]) for image in images]
        right += liked.index(max(liked)) == row["human_preference"]
    assert summary["choices"]["noise_free_accuracy"] == right / len(choices)
    assert summary["choices"]["models"].keys() == {"hpc.pth", "clip.safetensors"}
    assert all(-1 < model["correlation"] < 1 for model in summary["choices"]["models"].values())
    assert Image.open(out / "picture.png").width > 6 * 64
    assert (out / "report.html").read_text().count("<img") == 1


def test_no_prompt_is_used_twice(small_world):
    """What judges the result in the end was seen by no stage."""
    used = {
        row["prompt"]
        for split in ("train", "test")
        for row in json.loads((small_world / "dataset" / f"preference_{split}.json").read_text())
    }
    prompts = set(json.loads((small_world / "prompts.json").read_text()))
    assert len(used) == 24 and len(prompts) == 6 and not used & prompts


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_the_command_lines(stage):
    done = subprocess.run([sys.executable, f"{stage}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert f"{stage}.py --" in done.stdout


def test_importing_a_stage_does_nothing():
    for stage in STAGES:
        text = Path(f"{stage}.py").read_text()
        assert re.search(
            r'if __name__ == "__main__":\n    with one_line_errors\(\):\n        main\(parse_args\(\)\)\n$', text
        )


def test_the_originals_command_lines_parse():
    """The README of the original, word for word but for the script that was renamed there."""
    for stage, line in (
        (download_regularization_images, ""),
        (process_diffusiondb, "--clip_checkpoint /path/to/downloaded/checkpoint.pth --meta_file diffusiondb_hps.jsonl"),
        (
            select_training_images,
            "--positive_folder positive --negative_folder negative --meta_file diffusiondb_hps.jsonl --output_meta annotation.jsonl",
        ),
        (
            generate_images,
            "--unet_weight /path/to/checkpoint.bin --prompts /path/to/prompt_list.json --folder /path/to/output/folder",
        ),
        (evaluate_hps, "--hpc hpc.pth --image_folder output --meta_file output/meta.json"),
    ):
        stage.parse_args(line.split())
