"""LoRA training on the toy Stable Diffusion: its step against the formula, its processes, its resuming, its mistakes."""

import json
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import parts
import processes
import pytest
import torch
import upload_stand_in
from conftest import SD
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

import train_lora
from toy import world
from utils import checkpoints, latents, lora, model_card, training_pictures
from utils.errors import UserError, one_line_errors
from utils.jsonl import read

SMALL = f"--pretrained_model_name_or_path {SD} --resolution 32 --learning_rate 1e-3 --cpu --mixed_precision no --report_to none"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Twelve pictures with an annotation of best and worst and one of regularization."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    annotation, regularization = [], []
    for i, caption in enumerate(world.captions()[:12]):
        name = f"pictures/{i}.png"
        (folder / "pictures").mkdir(exist_ok=True)
        world.render(caption, rng, i % 2 == 1).resize((40, 48)).save(folder / name)
        if i < 8:
            kind = "negative" if i % 2 else "positive"
            annotation.append(
                {"id": i, "file_name": name, "prompt": caption, "type": kind, "confidence": 0.9, "batch_size": 4}
            )
        else:
            regularization.append({"file_name": name, "caption": caption})
    write_rows(folder / "annotation.jsonl", annotation)
    write_rows(folder / "regularization_images.jsonl", regularization)
    return folder


def write_rows(path: Path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(pictures, output, *options) -> list[str]:
    files = ["--annotation_file", pictures / "annotation.jsonl", "--output_dir", output]
    files += ["--regularization_annotation", pictures / "regularization_images.jsonl", "--dataloader_num_workers", "0"]
    return [str(option) for option in (*SMALL.split(), *files, *options)]


def run(pictures, output, *options):
    train_lora.main(train_lora.parse_args(arguments(pictures, output, *options)))
    return load_file(output / "pytorch_lora_weights.safetensors")


def batches(args, rows=None, rank=0, processes=1, **options):
    pipe = StableDiffusionPipeline.from_pretrained(SD)
    rows = training_pictures.read_rows(args) if rows is None else rows
    return training_pictures.TrainingBatches(rows, args, pipe.tokenizer, 1000, (4, 8, 8), rank, processes, **options)


def log(output) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def prompts_of(dataset, batch) -> list[str]:
    prompts = dataset.tokenizer.batch_decode(batch["tokens"], skip_special_tokens=True)
    return [prompt.replace(" .", ".") for prompt in prompts]


@pytest.mark.parametrize(
    ("target", "gamma"), [("epsilon", None), ("v_prediction", None), ("epsilon", 5), ("v_prediction", 0.5)]
)
def test_first_step_is_adamw_on_the_formula(pictures, tmp_path, monkeypatch, target, gamma):
    """Written out by hand: z_t = sqrt(a) z + sqrt(1 - a) noise, mean squared error, AdamW's first step is lr * sign."""
    model = tmp_path / "model"
    shutil.copytree(SD, model)
    config = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"prediction_type": target}))
    options = ("--pretrained_model_name_or_path", model, "--train_batch_size", 12, "--max_train_steps", 1)
    options = (*options, "--adam_weight_decay", 0, "--seed", 3, "--max_grad_norm", 1e9)
    options = (*options, "--snr_gamma", gamma) if gamma else options
    monkeypatch.setattr(torch.optim.AdamW, "step", processes.spy(torch.optim.AdamW.step, tmp_path, 0))
    got = run(pictures, tmp_path / "out", *options)
    monkeypatch.undo()
    args = train_lora.parse_args(arguments(pictures, tmp_path / "out", *options))
    batch = batches(args)[0]

    pipe = StableDiffusionPipeline.from_pretrained(model).to(torch.float32)
    pipe.unet.requires_grad_(False)
    torch.manual_seed(3)
    config = {"r": 4, "lora_alpha": 4, "init_lora_weights": "gaussian", "target_modules": lora.TARGET_MODULES}
    pipe.unet.add_adapter(train_lora.LoraConfig(**config))
    trained = {name: p for name, p in pipe.unet.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    with torch.no_grad():
        moments = pipe.vae.quant_conv(pipe.vae.encoder(batch["pixels"] / 127.5 - 1))
        mean, log_variance = moments.chunk(2, dim=1)
        z = (mean + torch.exp(0.5 * log_variance) * batch["vae_noise"]) * pipe.vae.config.scaling_factor
        prompt = pipe.text_encoder(batch["tokens"]).last_hidden_state
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    a = torch.cumprod(1 - betas, 0)[batch["timesteps"]].view(-1, 1, 1, 1)
    z_t = a.sqrt() * z + (1 - a).sqrt() * batch["noise"]
    wanted = batch["noise"] if target == "epsilon" else a.sqrt() * batch["noise"] - (1 - a).sqrt() * z
    error = (pipe.unet(z_t, batch["timesteps"], prompt).sample - wanted).square().mean((1, 2, 3))
    weights = torch.ones(12)
    if gamma:
        for i, (signal, noise) in enumerate(zip(a.flatten(), 1 - a.flatten(), strict=True)):
            weight = min(signal / noise, gamma)
            weights[i] = weight / (signal / noise) if target == "epsilon" else weight / (signal / noise + 1)
        assert weights.max() - weights.min() > 0.1
    loss = (error * weights).mean()
    loss.backward()

    row = log(tmp_path / "out")[0]
    assert row["loss"] == pytest.approx(loss.item(), rel=0, abs=1e-6)
    types = [args_row["type"] for args_row in training_pictures.read_rows(args)]
    order = np.random.default_rng((3, 0)).permutation(12)
    for kind in training_pictures.KINDS:
        of_kind = torch.tensor([types[i] == kind for i in order])
        assert row[f"loss/{kind}"] == pytest.approx(float((error * weights)[of_kind].mean()), abs=1e-6)
    norm = torch.stack([p.grad.norm() for p in trained.values()]).norm()
    assert row["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)

    moved = 0
    gradients = torch.load(tmp_path / "gradients-0-1.pt", weights_only=True)
    for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=1e-5)
        expected = before[name] - 1e-3 * gradient / (gradient.abs() + 1e-8)
        key = "unet." + name.replace("lora_A.default", "lora.down").replace("lora_B.default", "lora.up")
        torch.testing.assert_close(got[key], expected, rtol=1e-3, atol=2e-5)
        moved += int(((got[key] - before[name]).abs() > 5e-4).sum())
    assert moved > 1000


def test_however_the_batch_is_split_losses_and_gradients_agree(pictures, tmp_path):
    """1 x 8, 2 x 4 and 1 x 4 with accumulation 2: the first two steps, and both ranks' gradients bit for bit."""
    steps = ("--max_train_steps", 2, "--random_flip", "--prompt_dropout", 0.3, "--max_grad_norm", 1e9)
    for name, ranks, batch, accumulation in (("whole", 1, 8, 1), ("ranks", 2, 4, 1), ("accumulated", 1, 4, 2)):
        split = ("--train_batch_size", batch, "--gradient_accumulation_steps", accumulation)
        processes.run(ranks, arguments(pictures, tmp_path / name, *steps, *split), tmp_path / f"{name} spied")

    def gradients(name, rank, step):
        return torch.load(tmp_path / f"{name} spied" / f"gradients-{rank}-{step}.pt", weights_only=True)

    for step in (1, 2):
        assert all(
            torch.equal(a, b) for a, b in zip(gradients("ranks", 0, step), gradients("ranks", 1, step), strict=True)
        )
        for name in ("ranks", "accumulated"):
            for a, b in zip(gradients("whole", 0, step), gradients(name, 0, step), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
            ours, whole = log(tmp_path / name)[step - 1], log(tmp_path / "whole")[step - 1]
            for key in ("loss", "loss/positive", "loss/negative", "loss/regularization", "gradient_norm"):
                assert ours.get(key) == pytest.approx(whole.get(key), rel=1e-5)
    assert sum(float(gradient.abs().sum()) for gradient in gradients("whole", 0, 1)) > 0


def test_what_a_step_sees_depends_on_neither_processes_nor_accumulation(pictures, tmp_path):
    def seen(processes, batch_size, accumulation):
        args = train_lora.parse_args(
            arguments(
                pictures, tmp_path, "--train_batch_size", batch_size, "--gradient_accumulation_steps", accumulation
            )
            + ["--max_train_steps", "3", "--random_flip", "--prompt_dropout", "0.3"]
        )
        parts = [batches(args, None, rank, processes) for rank in range(processes)]
        assert len(parts[0]) == 3 * accumulation
        result = []
        for step in range(3):
            got = [part[step * accumulation + i] for i in range(accumulation) for part in parts]
            result.append({key: torch.cat([g[key] for g in got]) for key in got[0]})
        return result

    expected = seen(1, 8, 1)
    for other in (seen(2, 4, 1), seen(1, 4, 2), seen(4, 1, 2)):
        for a, b in zip(expected, other, strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)


def test_workers_change_nothing(pictures, tmp_path):
    """None, one and three give the same LoRA, bit for bit, with all that is random turned on."""
    options = ("--train_batch_size", 3, "--max_train_steps", 9, "--random_flip", "--prompt_dropout", 0.3)
    none, *others = (run(pictures, tmp_path / str(n), *options, "--dataloader_num_workers", n) for n in (0, 1, 3))
    for other in others:
        assert other.keys() == none.keys() and all(torch.equal(other[key], none[key]) for key in none)


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_run_ends_in_the_same_weights_and_log(pictures, tmp_path, ranks):
    """Kill -9 at random moments, then the same command."""
    options = ("--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--lr_scheduler", "constant_with_warmup")
    options = (*options, "--lr_warmup_steps", 4, "--checkpointing_steps", 3, "--max_train_steps", 16)
    options = (*options, "--report_to", "tensorboard", "--logging_steps", 2, "--checkpoints_total_limit", 2)
    options = (*options, "--cache_latents", tmp_path / "latents") if ranks == 1 else options
    started = time.monotonic()
    processes.run(ranks, arguments(pictures, tmp_path / "whole", *options), tmp_path / "said")
    whole = content(tmp_path / "whole")
    seconds = time.monotonic() - started
    assert [path.name for path in checkpoints.checkpoints(tmp_path / "whole")] == ["checkpoint-15", "checkpoint-16"]

    moments = seconds * np.random.default_rng().uniform(0.3, 1, 2)
    print(f"killed after {moments} s of {seconds} s")  # shown if this fails
    shutil.rmtree(tmp_path / "latents", ignore_errors=True)
    command = arguments(pictures, tmp_path / "killed", *options)
    for moment in moments:
        processes.kill(processes.start(ranks, command, tmp_path / "said"), moment)
    at = checkpoints.checkpoints(tmp_path / "killed")
    said = processes.run(ranks, command, tmp_path / "said")
    if at and "nothing to train" not in said:
        assert f"| {at[-1].name.split('-')[1]}/16 [" in said, "the bar starts where it stopped"
    assert content(tmp_path / "killed") == whole
    timeless = [
        [{k: v for k, v in row.items() if k not in ("images_per_second", "memory_gib")} for row in log(tmp_path / name)]
        for name in ("whole", "killed")
    ]
    assert timeless[0] == timeless[1]
    assert [row["step"] for row in timeless[0]] == list(range(1, 17))
    assert [event.step for event in events(tmp_path / "killed").Scalars("loss")] == list(range(1, 17))
    assert "nothing to train" in processes.run(ranks, command, tmp_path / "said")


def content(output) -> tuple[dict, bytes]:
    """The LoRA's header and the bytes of its tensors; safetensors writes the header's entries in any order."""
    file = (output / lora.FILE_NAMES[0]).read_bytes()
    end = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:end]), file[end:]


def events(output):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(output / "logs" / "train_lora")).Reload()


def test_going_on_with_other_settings(pictures, tmp_path):
    options = ("--train_batch_size", 4, "--checkpointing_steps", 2, "--cache_latents", tmp_path / "latents")
    longer = run(pictures, tmp_path / "whole", *options, "--max_train_steps", 6)
    run(pictures, tmp_path / "out", *options, "--max_train_steps", 4)
    for other, message in (
        (("--learning_rate", 2e-3), "learning_rate was 0.001, now 0.002"),
        (("--lora_rank", 8, "--seed", 1), "lora_rank was 4, now 8; seed was 42, now 1"),
        (("--train_batch_size", 8), "global_batch was 4, now 8"),
        (("--max_train_samples", 6), "annotation_file was '8 pictures, .*', now"),
    ):
        with pytest.raises(UserError, match=message):
            run(pictures, tmp_path / "out", *options, *other)

    # More steps, split otherwise, from the last checkpoint but one: the last was torn.
    (tmp_path / "out" / "checkpoint-4" / "training_state.pt").write_bytes(b"PK torn")
    (tmp_path / "out" / ".checkpoint-6.tmp").mkdir()
    split = ("--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--max_train_steps", 6)
    resumed = run(pictures, tmp_path / "out", *options, *split)
    for key in longer:
        torch.testing.assert_close(resumed[key], longer[key], rtol=1e-3, atol=1e-4)
    assert not (tmp_path / "out" / ".checkpoint-6.tmp").exists()

    # The same path, other weights.
    model = tmp_path / "model"
    shutil.copytree(SD, model)
    options = (*options, "--pretrained_model_name_or_path", model)
    run(pictures, tmp_path / "tuned", *options, "--max_train_steps", 2)
    state = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    save_file({k: v + 0.01 for k, v in state.items()}, model / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="was trained on other weights than .*model has now"):
        run(pictures, tmp_path / "tuned", *options, "--max_train_steps", 3)
    run(pictures, tmp_path / "tuned", *options, "--max_train_steps", 3, "--overwrite")
    assert [row["step"] for row in log(tmp_path / "tuned")] == [1, 2, 3]


def test_latent_cache_trains_as_without(pictures, tmp_path, monkeypatch):
    """The same random crops, to half precision's rounding; a second run encodes nothing, a changed picture anew."""
    shutil.copytree(pictures, tmp_path / "data")
    options = ("--train_batch_size", 6, "--max_train_steps", 4, "--random_flip")  # two epochs
    online = run(tmp_path / "data", tmp_path / "online", *options)
    options = (*options, "--cache_latents", tmp_path / "latents", "--crops_per_image", 2)
    encoded = []
    original = latents.encode_pixels
    monkeypatch.setattr(latents, "encode_pixels", lambda vae, pixels: encoded.append(1) or original(vae, pixels))
    caches = []
    fill = train_lora.fill_cache
    monkeypatch.setattr(train_lora, "fill_cache", lambda *args: caches.append(fill(*args)) or caches[-1])
    cached = run(tmp_path / "data", tmp_path / "cached", *options)
    assert len(encoded) == 2  # 12 pictures, two crops, in groups of 16
    for a, b in zip(log(tmp_path / "online"), log(tmp_path / "cached"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3) and a["loss"] != b["loss"]
    for key in online:
        torch.testing.assert_close(cached[key], online[key], rtol=0, atol=2e-3)
    entry = next((tmp_path / "latents").glob("*-32"))
    assert (entry / "latents.f16").stat().st_size == 12 * 2 * (2 * 4 * 8 * 8) * 2
    sent = pickle.dumps(caches[0])  # as to a worker that is no fork
    assert len(sent) < 12 * 2 * (2 * 4 * 8 * 8) * 2
    for name, value in caches[0].get(3, 1).items():
        assert torch.equal(pickle.loads(sent).get(3, 1)[name], value)

    run(tmp_path / "data", tmp_path / "again", *options)
    assert len(encoded) == 2
    (tmp_path / "data" / "pictures" / "3.png").write_bytes((pictures / "pictures" / "4.png").read_bytes())
    run(tmp_path / "data", tmp_path / "changed", *options)
    assert len(encoded) == 3 and (entry / "state.u8").read_bytes() == b"\1" * 26

    monkeypatch.setattr(latents.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    with pytest.raises(UserError, match=r"24 more latents of 1024 bytes take 0.00 GB, and 0.00 GB are free"):
        run(tmp_path / "data", tmp_path / "full", *options, "--cache_latents", tmp_path / "other")


def test_prefix_goes_to_the_worst_pictures_only(pictures, tmp_path):
    def prompts(*options):
        args = train_lora.parse_args(
            arguments(pictures, tmp_path, "--train_batch_size", 12, "--max_train_steps", 1, *options)
        )
        dataset = batches(args)
        return prompts_of(dataset, dataset[0])

    captions = world.captions()[:12]
    worst = {caption for i, caption in enumerate(captions) if i < 8 and i % 2}
    expected = {f"weird image. {caption}" if caption in worst else caption for caption in captions}
    assert set(prompts()) == expected
    assert sorted(prompts("--bare_prefix_prob", 1)).count("weird image.") == 4
    assert set(prompts("--prompt_dropout", 1)) == {""}
    assert set(prompts("--negative_prefix", "")) == set(captions)


def test_crop_keeps_the_short_side_and_moves(tmp_path):
    gradient = Image.fromarray(np.repeat(np.arange(64, dtype=np.uint8)[None], 32, 0)).convert("RGB")
    gradient.save(tmp_path / "gradient.png")
    for crop, expected in (
        ((0.0, 0.5, False), range(32)),
        ((1.0, 0.5, False), range(32, 64)),
        ((0.0, 0.5, True), range(31, -1, -1)),
    ):
        cut = training_pictures.cut({"image": tmp_path / "gradient.png"}, crop, 32)
        assert cut.shape == (3, 32, 32) and cut[0, 0].tolist() == list(expected)


def test_validation_draws_three_bands_without_touching_the_training(pictures, tmp_path):
    """At the start, on the way and at the end; two processes draw the pictures of one; the classifier's curves."""
    (tmp_path / "validation_prompts.txt").write_text("a red circle on a white background\n\na blue square\n")
    options = ("--train_batch_size", 2, "--max_train_steps", 3)
    plain = run(pictures, tmp_path / "a", *options)
    watched = (*options, "--validation_prompt_file", tmp_path / "validation_prompts.txt", "--validation_iters", 2)
    watched = (*watched, "--num_validation_images", 2, "--validation_inference_steps", 2, "--report_to", "tensorboard")
    watched = (*watched, "--hpc", parts.write_checkpoint(tmp_path / "hpc.pth"))
    validated = run(pictures, tmp_path / "b", *watched)
    assert all(torch.equal(plain[key], validated[key]) for key in plain)
    grids = sorted((tmp_path / "b" / "validation").glob("*.png"))
    assert [grid.name for grid in grids] == ["step-000000.png", "step-000002.png", "step-000003.png"]
    assert Image.open(grids[0]).size == (4 * 32, 3 * 32)

    assert [event.step for event in events(tmp_path / "b").Scalars("loss")] == [1, 2, 3]
    assert {tag.split("/")[0] for tag in events(tmp_path / "b").Tags()["images"]} == {
        "plain",
        "prefixed",
        "negative_prompt",
    }
    from utils import hps

    image = np.asarray(Image.open(grids[1]))
    classifier = hps.load(tmp_path / "hpc.pth")
    for band, way in enumerate(("plain", "prefixed", "negative_prompt")):
        drawn = [Image.fromarray(image[band * 32 : band * 32 + 32, i * 32 : i * 32 + 32]) for i in range(4)]
        prompts = ["a red circle on a white background"] * 2 + ["a blue square"] * 2
        curve = {event.step: event.value for event in events(tmp_path / "b").Scalars(f"hps/{way}")}
        assert curve.keys() == {0, 2, 3}
        assert curve[2] == pytest.approx(classifier.score(drawn, prompts).mean(), abs=1e-4)

    processes.run(2, arguments(pictures, tmp_path / "two", *watched, "--train_batch_size", 1), tmp_path / "said")
    for grid in grids:
        ours = np.asarray(Image.open(tmp_path / "two" / "validation" / grid.name)).astype(int)
        assert np.abs(ours - np.asarray(Image.open(grid))).max() <= 2


def test_model_card_is_what_the_hub_reads(pictures, tmp_path):
    from huggingface_hub import ModelCard

    (tmp_path / "prompts.txt").write_text('a "red" circle: on white\n')
    options = ("--train_batch_size", 2, "--max_train_steps", 1, "--validation_prompt_file", tmp_path / "prompts.txt")
    run(pictures, tmp_path / "out", *options, "--validation_inference_steps", 1, "--num_validation_images", 1)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model is None and "lora" in card.data.tags and card.data.library_name == "diffusers"
    widget = card.data.to_dict()["widget"][0]
    assert widget["text"] == 'a "red" circle: on white' and widget["parameters"] == {"negative_prompt": "Weird image. "}
    assert (tmp_path / "out" / widget["output"]["url"]).is_file()
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    settings["pretrained_model_name_or_path"] = "CompVis/stable-diffusion-v1-4"
    model_card.write_model_card(tmp_path, settings, [], 1)
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "CompVis/stable-diffusion-v1-4"
    header = lora.header(tmp_path / "out")
    assert header["negative_prompt"] == "Weird image. " and json.loads(header["options"])["lora_rank"] == 4


def test_push_to_hub(pictures, tmp_path, monkeypatch, capsys):
    """The hub's own client against a stand-in: what arrives, a second upload, and hubs that refuse."""
    server = upload_stand_in.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    out = tmp_path / "out"
    options = ["--train_batch_size", 2, "--max_train_steps", 2, "--push_to_hub", "--validation_iters", 1]
    options += ["--validation_prompt_file", tmp_path / "prompts.txt", "--validation_inference_steps", 1]

    def refused() -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop, one_line_errors():
            run(pictures, out, *options)
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert stop.value.code == 2 and len(said) == 1
        return said[0]

    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert re.match("error: --push_to_hub: .*401.* Invalid credentials", refused())
    assert not (out / "log.jsonl").exists(), "known before the training, not after"
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    server.refusals = {"/preupload/": 403}
    assert re.match(
        "error: --push_to_hub: .*403.* the hub says no.*; the LoRA is in .*out, the same command", refused()
    )
    assert not server.files and (out / lora.FILE_NAMES[0]).exists()

    server.refusals = {}
    names = {lora.FILE_NAMES[0], "README.md", "run.json", "validation/step-000002.png"}
    for commits in (1, 2):
        server.files.clear()
        run(pictures, out, *options)
        assert server.commits == commits
        assert server.files == {name: (out / name).read_bytes() for name in names}
    assert "nothing to train" in (said := capsys.readouterr().out) and "/me/out" in said.splitlines()[-1]
    assert [row["step"] for row in log(out)] == [1, 2]

    server.shutdown()
    server.server_close()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert re.match("error: --push_to_hub: .*Connection refused", refused())


@pytest.mark.parametrize("cached", [False, True])
def test_unusable_pictures_are_named_left_out_and_logged(pictures, tmp_path, capsys, cached):
    rows = [json.loads(line) for line in (pictures / "annotation.jsonl").read_text().splitlines()]
    whole = (pictures / rows[0]["file_name"]).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:-60])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").touch()
    (tmp_path / "fine.png").write_bytes(whole)
    names = ("fine.png", "cut.png", "text.png", "missing.png", "empty.png")
    write_rows(tmp_path / "annotation.jsonl", [rows[0] | {"file_name": name} for name in names])
    options = ["--annotation_file", tmp_path / "annotation.jsonl", "--train_batch_size", "4", "--max_train_steps", "2"]
    options += ["--cache_latents", tmp_path / "latents"] if cached else []
    for check, at_first in (("quick", 3), ("full", 4)):
        out = tmp_path / check
        out_options = ("--output_dir", out, "--check_data", check, "--dataloader_num_workers", 1)
        train_lora.main(train_lora.parse_args([str(o) for o in (*SMALL.split(), *options, *out_options)]))
        logged = [json.loads(line) for line in (out / "errors.jsonl").read_text().splitlines()]
        reasons = {row["item"].split(": ")[-1]: row["reason"] for row in logged}
        assert len(logged) == 4 and reasons.keys() == set(names[1:])
        assert sum(row["stage"] == "check_data" for row in logged) == at_first
        assert reasons["missing.png"] == "no such file" and reasons["empty.png"] == "an empty file"
        assert reasons["cut.png"].startswith("not a readable picture")
        said = capsys.readouterr().err
        assert f"left out: {tmp_path / 'annotation.jsonl'}: line 4: missing.png: no such file" in said
        assert f"{at_first} pictures left out" in said


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_that_all_cannot_be_decoded_end_with_one_line(pictures, tmp_path, capsys, workers):
    (tmp_path / "cut.png").write_bytes((pictures / "pictures" / "0.png").read_bytes()[:-60])
    write_rows(
        tmp_path / "r.jsonl", [{"file_name": "cut.png", "caption": "a"}, {"file_name": "cut.png", "caption": "b"}]
    )
    options = [*SMALL.split(), "--regularization_annotation", str(tmp_path / "r.jsonl"), "--train_batch_size", "2"]
    options += ["--output_dir", str(tmp_path / "o"), "--dataloader_num_workers", str(workers)]
    with pytest.raises(SystemExit) as stop, one_line_errors():
        train_lora.main(train_lora.parse_args(options))
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "Traceback" not in "".join(said)
    assert f"error: 100 pictures in a row cannot be decoded, see {tmp_path / 'o'}/errors.jsonl" in said
    assert sorted(row["item"] for row in read(tmp_path / "o" / "errors.jsonl")) == [
        f"{tmp_path / 'r.jsonl'}: line {i}: cut.png" for i in (1, 2)
    ]


def test_too_little_memory(pictures, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has 1 GiB")

    monkeypatch.setattr(UNet2DConditionModel, "forward", full)
    monkeypatch.setattr(sys, "argv", ["train_lora.py", *arguments(pictures, tmp_path / "o", "--train_batch_size", 4)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path("train_lora.py", run_name="__main__")
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: CUDA out of memory. Tried to allocate 2 GiB. A smaller batch takes less; ")


def test_compiled_blocks(pictures, tmp_path, monkeypatch):
    """No graph breaks, a graph for the first block (its input has no gradient) and one for the rest; validation adds none.

    The graphs run uncompiled: compiling takes half a minute.
    """
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    options = ["--train_batch_size", 3, "--max_train_steps", 3, "--validation_prompt_file", tmp_path / "prompts.txt"]
    options += ["--validation_iters", 2, "--validation_inference_steps", 1, "--num_validation_images", 1]
    plain = run(pictures, tmp_path / "plain", *options)
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled = run(pictures, tmp_path / "compiled", *options, "--compile")
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    assert compiled.keys() == plain.keys()
    for key in plain:
        torch.testing.assert_close(compiled[key], plain[key], rtol=1e-4, atol=1e-6)
    for name in ("step-000002.png", "step-000003.png"):
        grids = [np.asarray(Image.open(tmp_path / out / "validation" / name)) for out in ("plain", "compiled")]
        assert np.abs(grids[0].astype(int) - grids[1]).max() <= 2


def test_mistakes(pictures, tmp_path):
    with pytest.raises(UserError, match="nothing to train on"):
        train_lora.main(train_lora.parse_args(SMALL.split()))
    row = {"file_name": "a.png", "prompt": "p", "type": "positive"}
    for bad, message in (
        ({"type": "weird"}, "line 2: type is 'weird'"),
        ({"prompt": 3}, "line 2: field 'prompt' should be str, found 3"),
        ({"file_name": "../a.png"}, "line 2: '../a.png' leaves the folder"),
        ({"file_name": "/a.png"}, "line 2: '/a.png' leaves the folder"),
        ({}, "no usable picture in .*: no such file"),
    ):
        write_rows(tmp_path / "annotation.jsonl", [row, row | bad])
        with pytest.raises(UserError, match=message):
            options = [
                *SMALL.split(),
                "--annotation_file",
                str(tmp_path / "annotation.jsonl"),
                "--output_dir",
                str(tmp_path / "o"),
            ]
            train_lora.main(train_lora.parse_args(options))
    assert not (tmp_path / "o").exists()
    with pytest.raises(UserError, match="--train_batch_size 0: should be at least 1"):
        run(pictures, tmp_path / "o", "--train_batch_size", 0)
    with pytest.raises(UserError, match="--resolution 30: should be a multiple of 4"):
        run(pictures, tmp_path / "o", "--resolution", 30)
    with pytest.raises(UserError, match="validation.txt: no such file; write a prompt a line"):
        run(pictures, tmp_path / "o", "--validation_prompt_file", tmp_path / "validation.txt")
    command = [sys.executable, "train_lora.py", *arguments(pictures, tmp_path / "o", "--max_train_steps", 1)]
    done = subprocess.run([*command, "--pretrained_model_name_or_path", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --pretrained_model_name_or_path")
    assert "Traceback" not in done.stderr


def test_shell_script_shares_the_paper_batch_out(pictures, tmp_path):
    """`bash scripts/train_lora.sh` as in the original, on two CPU processes: 40 pictures a step, 20 for each."""
    environment = os.environ | {"work_dir": str(tmp_path / "work"), "model": SD, "processes": "2"}
    environment |= {"annotation": str(pictures / "annotation.jsonl"), "validation_prompts": "none"}
    environment |= {"regularization": str(pictures / "regularization_images.jsonl"), "OMP_NUM_THREADS": "1"}
    options = ["--resolution", "32", "--max_train_steps", "1", "--dataloader_num_workers", "0", "--report_to", "none"]
    command = ["bash", "scripts/train_lora.sh", *options, "--cpu", "--mixed_precision", "no"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    settings = json.loads((tmp_path / "work" / "run.json").read_text())["settings"]
    assert (settings["global_batch"], settings["learning_rate"]) == (40, 1e-5)
    assert "LoRA after 1 steps of 40 pictures" in done.stdout


def test_shell_scripts_on_gpus_machines_and_slurm(tmp_path):
    """The command lines that come out, with stand-ins for the launcher, the GPUs and SLURM."""
    stand_ins = {
        "torchrun": 'echo "$@"',
        "nvidia-smi": 'for i in $(seq "$gpus_here"); do echo "GPU $i: H100 (UUID)"; done',
        "scontrol": "echo node7; sleep 0.1; echo node8",
        "srun": 'for rank in 0 1; do SLURM_PROCID=$rank "$@"; done',
    }
    for name, command in stand_ins.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{command}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "123456"}
    two = {"machines": "2", "machine_rank": "1", "main_address": "node1"}

    def lines(script, gpus, **more):
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "gpus_here": str(gpus)} | more
        done = subprocess.run(["bash", f"scripts/{script}", "--seed", "a b"], env=environment, capture_output=True)
        return done.returncode, done.stdout.decode().splitlines()

    for script, gpus, more, launch, batch in (
        ("train_lora.sh", 1, {}, ["--nproc_per_node 1 --standalone"], 40),
        ("train_lora.sh", 8, {}, ["--nproc_per_node 8 --standalone"], 5),
        ("train_lora.sh", 4, two, ["--nnodes 2 --node_rank 1 --master_addr node1 --master_port 29500"], 5),
        (
            "train_lora_slurm.sh", 4, slurm,
            [f"--nnodes 2 --node_rank {rank} --master_addr node7 --master_port 23456" for rank in (0, 1)], 5,
        ),
    ):  # fmt: skip
        code, said = lines(script, gpus, **more)
        assert code == 0 and len(said) == len(launch)
        for line, expected in zip(said, launch, strict=True):
            assert f"{expected} train_lora.py" in line and f"--train_batch_size {batch} " in line
            assert "--mixed_precision fp16" in line and line.endswith("--seed a b")
    assert lines("train_lora.sh", 3) == (2, [])
