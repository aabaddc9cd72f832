"""Generation on the toy Stable Diffusion: pictures belong to their prompt's seed, whatever else happens."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import SD
from diffusers import StableDiffusionPipeline
from PIL import Image
from test_lora import random_matrices, toy_unet, write

import generate_images
from utils.errors import UserError

PROMPTS = [
    "a red circle on a white background", "a blue square on a black background, oil painting", "",
    "a green triangle on a white background, 4 k", "a yellow circle on a black background",
]  # fmt: skip


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(PROMPTS))
    return path


# At this quality the JPEG adds nothing to the differences that are compared.
OPTIONS = f"--pretrained_model_name_or_path {SD} --device cpu --quality 100 --num_inference_steps 4 --guidance_scale 2".split()


def run(prompts, folder, *options):
    where = ["--prompts", str(prompts), "--folder", str(folder)]
    generate_images.main(generate_images.parse_args([*OPTIONS, *where, *map(str, options)]))
    return pictures(folder)


def pictures(folder):
    return {p.name: np.asarray(Image.open(p)).astype(int) for p in sorted(folder.glob("*.jpg"))}


def assert_same(a, b, levels=2):
    assert a.keys() == b.keys()
    assert max(np.abs(a[name] - b[name]).max() for name in a) <= levels


def test_batches_processes_and_reruns_change_nothing(prompts, tmp_path):
    whole = run(prompts, tmp_path / "a", "--batch_size", 5)
    assert sorted(whole) == [f"{i}.jpg" for i in range(5)]
    meta = json.loads((tmp_path / "a" / "meta.json").read_text())
    assert meta == [{"file_name": f"{i}.jpg", "caption": p, "seed": i} for i, p in enumerate(PROMPTS)]

    assert_same(run(prompts, tmp_path / "b", "--batch_size", 2), whole)
    for rank in (1, 0):
        assert not (tmp_path / "c" / "meta.json").exists()
        got = run(prompts, tmp_path / "c", "--batch_size", 2, "--world_size", 2, "--rank", rank)
    assert_same(got, whole)
    assert json.loads((tmp_path / "c" / "meta.json").read_text()) == meta

    (tmp_path / "a" / "1.jpg").unlink()
    (tmp_path / "a" / "meta.json").unlink()
    untouched = (tmp_path / "a" / "0.jpg").stat().st_mtime_ns
    assert_same(run(prompts, tmp_path / "a"), whole)
    assert (tmp_path / "a" / "0.jpg").stat().st_mtime_ns == untouched
    assert (tmp_path / "a" / "meta.json").exists()


def test_equals_the_pipeline_called_by_hand(prompts, tmp_path):
    got = run(prompts, tmp_path / "a", "--seed", 10)
    pipe = StableDiffusionPipeline.from_pretrained(SD).to(torch.float32)
    image = pipe(
        PROMPTS[3], negative_prompt="Weird image. ", generator=torch.Generator().manual_seed(13), num_inference_steps=4,
        guidance_scale=2,
    ).images[0]  # fmt: skip
    image.save(tmp_path / "hand.jpg", quality=100)
    assert_same({"": got["3.jpg"]}, {"": np.asarray(Image.open(tmp_path / "hand.jpg")).astype(int)})


def test_lora_in_every_layout_gives_the_same_pictures(prompts, tmp_path):
    base = run(prompts, tmp_path / "base")
    matrices = random_matrices(toy_unet(), 4)
    results = []
    for layout in ("legacy", "modern", "kohya"):
        suffix = "bin" if layout == "legacy" else "safetensors"
        results.append(
            run(prompts, tmp_path / layout, "--unet_weight", write(tmp_path / f"{layout}.{suffix}", matrices, layout))
        )
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])
    assert max(np.abs(results[0][name] - base[name]).max() for name in base) > 30
    unscaled = run(prompts, tmp_path / "off", "--unet_weight", tmp_path / "legacy.bin", "--lora_scale", 0)
    assert_same(unscaled, base)


def test_killed_run_leaves_whole_pictures_and_goes_on(prompts, tmp_path):
    whole = run(prompts, tmp_path / "a", "--batch_size", 1)
    where = ["--prompts", prompts, "--folder", tmp_path / "b", "--batch_size", "1"]
    process = subprocess.Popen([sys.executable, "generate_images.py", *OPTIONS, *where], stderr=subprocess.DEVNULL)
    while not (tmp_path / "b" / "0.jpg").exists():
        assert process.poll() is None
    process.kill()
    process.wait()
    for path in (tmp_path / "b").glob("*.jpg"):
        Image.open(path).load()
    assert_same(run(prompts, tmp_path / "b", "--batch_size", 1), whole)


def test_other_recipe_is_refused(prompts, tmp_path):
    run(prompts, tmp_path / "a")
    with pytest.raises(UserError, match=r"guidance_scale was 2.0, now 5.0"):
        run(prompts, tmp_path / "a", "--guidance_scale", 5)
    before = pictures(tmp_path / "a")
    after = run(prompts, tmp_path / "a", "--guidance_scale", 5, "--overwrite")
    assert max(np.abs(before[name] - after[name]).max() for name in before) > 2


def test_mistakes(prompts, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        run(tmp_path / "none.json", tmp_path / "a")
    (tmp_path / "bad.json").write_text('["fine", 3]')
    with pytest.raises(UserError, match="element 1: expected a string, found 3"):
        run(tmp_path / "bad.json", tmp_path / "a")
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(UserError, match="no prompts"):
        run(tmp_path / "empty.json", tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(UserError, match="not there"):
        wrong = {"down_blocks.7.attentions.0.transformer_blocks.0.attn1.to_q": (torch.zeros(2, 8), torch.zeros(8, 2))}
        run(prompts, tmp_path / "b", "--unet_weight", write(tmp_path / "x.safetensors", wrong, "modern"))
    with pytest.raises(UserError, match="no such file"):
        run(prompts, tmp_path / "c", "--unet_weight", tmp_path / "missing.bin")

    command = [sys.executable, "generate_images.py", "--pretrained_model_name_or_path", str(tmp_path / "nowhere")]
    done = subprocess.run([*command, "--prompts", prompts, "--folder", tmp_path / "d"], capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[-1].startswith("error: --pretrained_model_name_or_path")
        and "Traceback" not in done.stderr
    )
    shutil.rmtree(tmp_path / "d")
