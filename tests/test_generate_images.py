"""Generation on the toy Stable Diffusion: pictures belong to their number's seed, whatever else happens."""

import hashlib
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import SD
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from sd_parsers import ParserManager
from test_lora import random_matrices, toy_unet, write
from transformers import CLIPConfig, CLIPImageProcessor

import generate_images
from utils import lora
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
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".jpg", ".png", ".webp")]
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in files}


def assert_same(a, b, levels=2):
    assert a.keys() == b.keys()
    assert max(np.abs(a[name] - b[name]).max() for name in a) <= levels


def test_batches_processes_and_reruns_change_nothing(prompts, tmp_path):
    whole = run(prompts, tmp_path / "a", "--batch_size", 5)
    assert sorted(whole) == [f"{i}.jpg" for i in range(5)]
    meta = json.loads((tmp_path / "a" / "meta.json").read_text())
    assert meta == [{"file_name": f"{i}.jpg", "caption": p, "seed": i} for i, p in enumerate(PROMPTS)]

    assert_same(run(prompts, tmp_path / "b", "--batch_size", 2), whole)
    for rank in (1, 2, 0):
        assert not (tmp_path / "c" / "meta.json").exists()
        got = run(prompts, tmp_path / "c", "--batch_size", 2, "--world_size", 3, "--rank", rank)
    assert_same(got, whole)
    assert json.loads((tmp_path / "c" / "meta.json").read_text()) == meta

    (tmp_path / "a" / "1.jpg").unlink()
    (tmp_path / "a" / "meta.json").unlink()
    untouched = (tmp_path / "a" / "0.jpg").stat().st_mtime_ns
    assert_same(run(prompts, tmp_path / "a"), whole)
    assert (tmp_path / "a" / "0.jpg").stat().st_mtime_ns == untouched
    assert (tmp_path / "a" / "meta.json").exists()


def test_torchrun_writes_the_same_folder(prompts, tmp_path):
    whole = run(prompts, tmp_path / "a")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "generate_images.py",
    ]
    where = ["--prompts", prompts, "--folder", tmp_path / "b"]
    done = subprocess.run([*command, *OPTIONS, *where], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same(pictures(tmp_path / "b"), whole)
    assert (tmp_path / "b" / "meta.json").read_bytes() == (tmp_path / "a" / "meta.json").read_bytes()


def test_killed_processes_and_machines_that_share_a_folder_change_nothing(prompts, tmp_path):
    prompts.write_text(json.dumps(PROMPTS * 2))
    whole = run(prompts, tmp_path / "whole")
    options = ["3", "0", str(tmp_path), *OPTIONS, "--prompts", str(prompts)]
    done = subprocess.run(
        [sys.executable, "tests/kill_generation.py", *options],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": "."},
    )
    assert done.returncode == 0, done.stderr
    for folder in (tmp_path / "killed", tmp_path / "shared"):
        assert_same(pictures(folder), whole)
        assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
        assert (folder / "meta.json").read_bytes() == (tmp_path / "whole" / "meta.json").read_bytes()


SCHEDULERS = {
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_equals_the_pipeline_called_by_hand_with_the_lora_unfused(prompts, tmp_path, name):
    matrices = random_matrices(toy_unet(), 4)
    file = write(tmp_path / "adapted_model.bin", matrices, "legacy")
    options = ["--seed", 10, "--scheduler", name, "--format", "png", "--unet_weight", tmp_path, "--lora_scale", 0.5]
    got = run(prompts, tmp_path / "a", *options)

    pipe = StableDiffusionPipeline.from_pretrained(SD, dtype=torch.float32)
    kind, config = SCHEDULERS[name]
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **config)
    lora.attach(pipe.unet, lora.read(file))
    by_hand = pipe(
        PROMPTS[3], negative_prompt="Weird image. ", generator=torch.Generator().manual_seed(13), num_inference_steps=4,
        guidance_scale=2, cross_attention_kwargs={"scale": 0.5},
    ).images[0]  # fmt: skip
    assert_same({"": got["3.png"]}, {"": np.asarray(by_hand).astype(int)}, levels=1)


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


def watch(monkeypatch, fits: int | None = None) -> list[int]:
    """Return a list that grows by the UNet's batch size at each call; of more than `fits` the allocator runs out of memory."""
    seen, forward = [], UNet2DConditionModel.forward

    def watched(self, sample, *args, **kwargs):
        seen.append(len(sample))
        if fits and len(sample) > fits:
            torch.empty(10**17)
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", watched)
    return seen


def test_batches_are_halved_when_memory_runs_out(prompts, tmp_path, monkeypatch, capsys):
    whole = run(prompts, tmp_path / "a")
    seen = watch(monkeypatch, fits=4)  # two pictures, each with and without its prompt
    assert_same(run(prompts, tmp_path / "b", "--batch_size", 5), whole)
    assert seen[:2] == [10, 4] and seen.count(4) == 10 and seen.count(2) == 5
    assert capsys.readouterr().out.count("memory ran out; going on with 2 pictures at once") == 1
    watch(monkeypatch, fits=1)
    with pytest.raises(UserError, match="not enough memory to draw a single picture"):
        run(prompts, tmp_path / "c")


def test_a_compiled_unet_sees_one_batch_size(prompts, tmp_path, monkeypatch):
    whole = run(prompts, tmp_path / "a")
    asked = []
    # Compiling takes a minute; what matters here is when and how it is asked for.
    monkeypatch.setattr(UNet2DConditionModel, "compile", lambda self, **options: asked.append(options))
    seen = watch(monkeypatch)
    assert_same(run(prompts, tmp_path / "b", "--batch_size", 2, "--compile"), whole)
    assert asked == [{"fullgraph": True, "dynamic": False}] and set(seen) == {4}


def test_pictures_carry_their_recipe(tmp_path):
    prompt = 'a red circle, "oil": 100% 猫\nsecond line'
    long = "🐱" * 30_000  # more than a JPEG has room for
    (tmp_path / "prompts.jsonl").write_text(json.dumps(prompt) + "\n" + json.dumps(long) + "\n")
    write(tmp_path / "lora.safetensors", random_matrices(toy_unet(), 2), "modern")
    content = (tmp_path / "lora.safetensors").read_bytes()
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    options = ["--seed", 7, "--unet_weight", tmp_path / "lora.safetensors"]
    for suffix in ("jpg", "png", "webp"):
        run(tmp_path / "prompts.jsonl", tmp_path / suffix, "--format", suffix, *options)
        read = ParserManager().parse(tmp_path / suffix / f"0.{suffix}")
        assert [p.value for p in read.prompts] == [prompt]
        assert [p.value for p in read.negative_prompts] == ["Weird image."]
        sampler = read.samplers[0]
        assert sampler.name == "PLMS" and sampler.parameters == {"cfg_scale": "2.0", "seed": "7", "steps": "4"}
        assert read.metadata["Size"] == "32x32" and sampler.model.name == "stable-diffusion"
        # The reader's regular expression for a quoted value, as AUTOMATIC1111 writes a LoRA's hash.
        written = re.search(r'Lora hashes: "(?:\\.|[^\\"])+"', str(read.raw_parameters))[0]
        assert written == f'Lora hashes: "lora: {hashlib.sha256(tensors).hexdigest()[:12]}"'
        assert ParserManager().parse(tmp_path / suffix / f"1.{suffix}").prompts[0].value == long[:10_000]
        with Image.open(tmp_path / suffix / f"0.{suffix}") as image:
            # AUTOMATIC1111's reader fails on a UserComment of another type than 7, UNDEFINED.
            assert suffix == "png" or image.info["exif"].count(b"\x92\x86\0\7") == 1

    run(tmp_path / "prompts.jsonl", tmp_path / "bare", "--no_metadata", *options)
    with Image.open(tmp_path / "bare" / "0.jpg") as image:
        assert not image.getexif() and "comment" not in image.info


def test_several_pictures_a_prompt_of_another_size(prompts, tmp_path):
    single = run(prompts, tmp_path / "a", "--height", 16, "--width", 48, "--format", "png")
    several = run(prompts, tmp_path / "b", "--height", 16, "--width", 48, "--format", "png", "--images_per_prompt", 2)
    assert sorted(several) == sorted(f"{k}.png" for k in range(10)) and several["0.png"].shape == (16, 48, 3)
    meta = json.loads((tmp_path / "b" / "meta.json").read_text())
    assert [(row["caption"], row["seed"]) for row in meta] == [(PROMPTS[k // 2], k) for k in range(10)]
    assert_same({"": several["0.png"]}, {"": single["0.png"]})
    assert np.abs(several["1.png"] - several["0.png"]).max() > 30


def test_other_recipe_is_refused(prompts, tmp_path):
    run(prompts, tmp_path / "a")
    with pytest.raises(UserError, match=r"guidance_scale was 2.0, now 5.0"):
        run(prompts, tmp_path / "a", "--guidance_scale", 5)
    before = pictures(tmp_path / "a")
    (tmp_path / "a" / "photo.jpg").write_bytes((tmp_path / "a" / "0.jpg").read_bytes())
    after = run(prompts, tmp_path / "a", "--guidance_scale", 5, "--overwrite")
    assert max(np.abs(before[name] - after[name]).max() for name in before) > 2
    assert (after["photo.jpg"] == before["0.jpg"]).all()

    # The same command goes on, as without --overwrite.
    untouched = (tmp_path / "a" / "0.jpg").stat().st_mtime_ns
    (tmp_path / "a" / "1.jpg").unlink()
    run(prompts, tmp_path / "a", "--guidance_scale", 5, "--overwrite")
    assert (tmp_path / "a" / "0.jpg").stat().st_mtime_ns == untouched

    prompts.write_text(json.dumps(PROMPTS[::-1]))
    with pytest.raises(UserError, match="prompts was '5, SHA-256 .*now '5, SHA-256"):
        run(prompts, tmp_path / "a", "--guidance_scale", 5)
    (tmp_path / "a" / "run.json").unlink()
    with pytest.raises(UserError, match="holds pictures, but no run.json"):
        run(prompts, tmp_path / "a")
    assert_same({"": run(prompts, tmp_path / "a", "--overwrite")["4.jpg"]}, {"": before["4.jpg"]}, levels=255)
    assert json.loads((tmp_path / "a" / "meta.json").read_text())[4]["caption"] == PROMPTS[0]


def test_long_prompts_are_cut_with_a_counted_warning(prompts, tmp_path, capsys):
    long = "a red circle on a white background, " + "very " * 100
    prompts.write_text(json.dumps([*PROMPTS, long + "good", long + "bad"]))
    got = run(prompts, tmp_path / "a", "--seed", 3)
    assert "warning: 2 of 7 prompts are longer than the 77 tokens" in capsys.readouterr().out
    prompts.write_text(json.dumps([long + "bad"]))
    assert_same({"": got["6.jpg"]}, {"": run(prompts, tmp_path / "b", "--seed", 9)["0.jpg"]})


def test_safety_checker_blackens_and_says_so(prompts, tmp_path, capsys):
    with pytest.raises(UserError, match="--safety_checker: .* has none"):
        run(prompts, tmp_path / "none", "--safety_checker")
    plain = run(prompts, tmp_path / "a", "--format", "png")
    save_with_checker(tmp_path / "model", list(plain.values()), flagged=2)
    model = ["--pretrained_model_name_or_path", tmp_path / "model"]
    checked = run(prompts, tmp_path / "b", *model, "--format", "png", "--safety_checker")
    meta = json.loads((tmp_path / "b" / "meta.json").read_text())
    assert [row["flagged"] for row in meta] == [False, False, True, False, False]
    assert "safety checker: 1 of 5 pictures are black" in capsys.readouterr().out
    assert (checked.pop("2.png") == 0).all() and plain.pop("2.png").any()
    assert_same(checked, plain)
    assert pictures(tmp_path / "a").keys() == run(prompts, tmp_path / "c", *model, "--format", "png").keys()
    assert "flagged" not in (tmp_path / "c" / "meta.json").read_text()


def save_with_checker(folder, seen: list[np.ndarray], flagged: int):
    """Write the toy Stable Diffusion with a small safety checker whose one concept is what it sees in one picture only."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**size, "image_size": 32, "patch_size": 8, "initializer_range": 1.0}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, text_config=size, projection_dim=8)).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    pixels = processor([Image.fromarray(array.astype(np.uint8)) for array in seen], return_tensors="pt").pixel_values
    with torch.no_grad():
        found = torch.nn.functional.normalize(checker.visual_projection(checker.vision_model(pixels)[1]))
    concept = torch.linalg.pinv(found)[:, flagged]  # at right angles to all pictures but this one
    cosine = 1 / concept.norm()
    assert cosine > 0.005
    checker.concept_embeds.data[:], checker.concept_embeds_weights.data[:] = concept, cosine / 2
    pipe = StableDiffusionPipeline.from_pretrained(SD, safety_checker=checker, feature_extractor=processor)
    pipe.save_pretrained(folder)


def test_mistakes(prompts, tmp_path):
    for options, said in {
        ("--batch_size", 0): "--batch_size 0: should be at least 1",
        ("--num_inference_steps", 0): "--num_inference_steps 0: should be at least 1",
        ("--quality", 101): "--quality 101: should be 1 to 100",
        ("--seed", -1): "--seed -1: should be 0",
        ("--rank", 1): "give both",
        ("--unet_weight", tmp_path / "missing.bin"): "no such file",
        ("--unet_weight", tmp_path): "no such file",
    }.items():
        with pytest.raises(UserError, match=said):
            run(prompts, tmp_path / "a", *options)
    with pytest.raises(UserError, match="no such file"):
        run(tmp_path / "none.json", tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(UserError, match="--height 30: should be a multiple of 4"):
        run(prompts, tmp_path / "b", "--height", 30)
    with pytest.raises(UserError, match="--num_inference_steps 1001: the model has 1000"):
        run(prompts, tmp_path / "b", "--num_inference_steps", 1001)
    with pytest.raises(UserError, match="not there"):
        wrong = {"down_blocks.7.attentions.0.transformer_blocks.0.attn1.to_q": (torch.zeros(2, 8), torch.zeros(8, 2))}
        run(prompts, tmp_path / "b", "--unet_weight", write(tmp_path / "x.safetensors", wrong, "modern"))

    command = [sys.executable, "generate_images.py", "--pretrained_model_name_or_path", str(tmp_path / "nowhere")]
    done = subprocess.run([*command, "--prompts", prompts, "--folder", tmp_path / "d"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: --pretrained_model_name_or_path")
