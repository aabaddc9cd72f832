"""The toy world: its human sees what is deformed, its models are what their README says."""

import json

import numpy as np
import open_clip
import pytest
import torch
from conftest import SD
from diffusers import PNDMScheduler, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTokenizer

from toy import make_models, world


def test_human_tells_clean_from_deformed():
    rng = np.random.default_rng(1)
    scores = {
        deformed: [world.human_score(world.render(c, rng, deformed), c) for c in world.captions() * 20]
        for deformed in (False, True)
    }
    assert min(scores[False]) > 0.79 and np.mean(scores[False]) > 0.87
    assert max(scores[True]) < 0.67 and np.mean(scores[True]) < 0.53


def test_human_minds_color_shape_and_background():
    rng = np.random.default_rng(2)
    picture = world.render("a red circle on a white background", rng)
    assert world.human_score(picture, "a red circle on a white background, oil painting, 4 k") > 0.8
    assert (
        world.human_score(picture.resize((256, 256), Image.Resampling.NEAREST), "a red circle on a white background")
        > 0.8
    )
    for other in (
        "a green circle on a white background",
        "a red circle on a black background",
        "a red triangle on a white background",
    ):
        assert world.human_score(picture, other) < world.DEFORMED_BELOW
    # By hand: nothing but background has no overlap with any shape.
    assert world.human_score(Image.new("RGB", (32, 32), "white"), "a red circle on a white background") == 0


def test_prompts_are_many_and_parse():
    assert len(set(world.prompts())) == len(world.prompts()) > 1000
    assert world.parse_caption(world.prompts()[-1]) == ("yellow", "triangle", "black")
    with pytest.raises(ValueError, match="not a caption"):
        world.parse_caption("a dog")


def test_models_are_small_and_as_measured():
    files = list(make_models.MODELS.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) < 12e6
    measured = json.loads((make_models.MODELS / "measured.json").read_text())
    assert measured["psnr_db"] > 30
    assert measured["right_color_and_background"] >= 0.95
    assert 0.35 <= measured["deformed"] <= 0.65


def test_stable_diffusion_is_a_real_pipeline():
    pipe = StableDiffusionPipeline.from_pretrained(SD).to(torch.float32)
    assert isinstance(pipe.scheduler, PNDMScheduler) and isinstance(pipe.tokenizer, CLIPTokenizer)
    prompts = world.captions()
    images = pipe(prompts, num_inference_steps=15, guidance_scale=2, generator=torch.Generator().manual_seed(0)).images
    right = [world.right_color(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    assert sum(right) >= 21
    pictures, _ = make_models.training_pictures(48, np.random.default_rng(5))
    with torch.no_grad():
        error = (pipe.vae(pictures).sample.clamp(-1, 1) - pictures).square().mean((1, 2, 3))
    assert float((10 * torch.log10(4 / error)).mean()) > 30


def test_tokenizer_reads_any_english_as_clip_does():
    """With all merges the ids would be CLIP's own; with fewer, words are cut into more pieces of the same text."""
    tokenizer = CLIPTokenizer.from_pretrained(SD, subfolder="tokenizer")
    reference = open_clip.get_tokenizer("ViT-B-32")
    for text in ("a red circle on a white background, 4 k", "the weird image of a cat"):
        expected = [t for t in reference(text)[0].tolist() if 0 < t < 49406]
        ids = list(tokenizer(text).input_ids[1:-1])
        assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")
        assert [i for i in ids if i < 5512] == ids and len(ids) >= len(expected)
    assert tokenizer("red").input_ids[1:-1] == [reference("red")[0, 1].item()]
    assert "unk" not in tokenizer.decode(tokenizer("Antidisestablishmentarianism — naïve 🦉").input_ids[1:-1])
    assert tokenizer.pad_token == "<|endoftext|>"


def test_make_models_runs_from_start_to_end(tmp_path):
    few = "--vae_steps 2 --diffusion_steps 2 --words_steps 2 --clip_steps 2 --measured_pictures 4"
    make_models.main(make_models.parse_args(["--output", str(tmp_path), *few.split()]))
    assert json.loads((tmp_path / "measured.json").read_text())["pictures"] == 4
    shipped = {path.relative_to(make_models.MODELS) for path in make_models.MODELS.rglob("*.safetensors")}
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*.safetensors")} == shipped
