"""LoRA training on the toy Stable Diffusion: its step against the formula, its processes, its resuming, its mistakes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SD
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import train_lora
from toy import world
from utils import lora
from utils.errors import UserError

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


def batches(args, rows, rank=0, processes=1):
    pipe = StableDiffusionPipeline.from_pretrained(SD)
    scheduler = train_lora.DDPMScheduler.from_config(pipe.scheduler.config)
    accelerator = SimpleNamespace(process_index=rank, num_processes=processes)
    return train_lora.TrainingBatches(rows, pipe, scheduler, args, accelerator, first_step=0)


def prompts_of(dataset, batch) -> list[str]:
    prompts = dataset.tokenizer.batch_decode(batch["tokens"], skip_special_tokens=True)
    return [prompt.replace(" .", ".") for prompt in prompts]


@pytest.mark.parametrize("target", ["epsilon", "v_prediction"])
def test_first_step_is_adamw_on_the_formula(pictures, tmp_path, target):
    """Written out by hand: z_t = sqrt(a) z + sqrt(1 - a) noise, mean squared error, AdamW's first step is lr * sign."""
    model = tmp_path / "model"
    shutil.copytree(SD, model)
    config = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"prediction_type": target}))
    options = (
        "--pretrained_model_name_or_path",
        model,
        "--train_batch_size",
        12,
        "--max_train_steps",
        1,
        "--adam_weight_decay",
        0,
        "--seed",
        3,
    )
    got = run(pictures, tmp_path / "out", *options)
    args = train_lora.parse_args(arguments(pictures, tmp_path / "out", *options))
    rows, _ = train_lora.read_rows(args)
    batch = batches(args, rows)[0]

    pipe = StableDiffusionPipeline.from_pretrained(model).to(torch.float32)
    pipe.unet.requires_grad_(False)
    torch.manual_seed(3)
    config = {"r": 4, "lora_alpha": 4, "init_lora_weights": "gaussian", "target_modules": lora.TARGET_MODULES}
    pipe.unet.add_adapter(train_lora.LoraConfig(**config))
    trained = {name: p for name, p in pipe.unet.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    with torch.no_grad():
        moments = pipe.vae.quant_conv(pipe.vae.encoder(batch["pixels"]))
        mean, log_variance = moments.chunk(2, dim=1)
        z = (mean + torch.exp(0.5 * log_variance) * batch["vae_noise"]) * pipe.vae.config.scaling_factor
        prompt = pipe.text_encoder(batch["tokens"]).last_hidden_state
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    a = torch.cumprod(1 - betas, 0)[batch["timesteps"]].view(-1, 1, 1, 1)
    z_t = a.sqrt() * z + (1 - a).sqrt() * batch["noise"]
    wanted = batch["noise"] if target == "epsilon" else a.sqrt() * batch["noise"] - (1 - a).sqrt() * z
    loss = (pipe.unet(z_t, batch["timesteps"], prompt).sample - wanted).square().mean()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in trained.values()]).norm()

    moved = 0
    for name, parameter in trained.items():
        gradient = parameter.grad * min(1, 1.0 / (norm + 1e-6))
        expected = before[name] - 1e-3 * gradient / (gradient.abs() + 1e-8)
        key = "unet." + name.replace("lora_A.default", "lora.down").replace("lora_B.default", "lora.up")
        certain = gradient.abs() > 1e-6  # below, rounding decides on the sign
        torch.testing.assert_close(got[key][certain], expected[certain], rtol=1e-3, atol=2e-5)
        moved += int(((got[key] - before[name]).abs() > 5e-4).sum())
    assert moved > 1000


def test_two_processes_have_equal_gradients_and_one_process_result(pictures, tmp_path):
    """Every optimizer step's gradients are written down on both ranks: equal, and the run ends where one process does."""
    script = tmp_path / "spy.py"
    script.write_text(
        "import sys, torch, train_lora\n"
        f"sys.path.insert(0, {str(Path.cwd())!r})\n"
        "step = torch.optim.AdamW.step\n"
        "def spy(self, *args, **kwargs):\n"
        "    rank = torch.distributed.get_rank()\n"
        "    grads = [p.grad.clone() for g in self.param_groups for p in g['params']]\n"
        f"    torch.save(grads, {str(tmp_path)!r} + f'/gradients-{{rank}}.pt')\n"
        "    return step(self, *args, **kwargs)\n"
        "torch.optim.AdamW.step = spy\n"
        "train_lora.main(train_lora.parse_args(sys.argv[1:]))\n"
    )
    steps = ("--max_train_steps", 2, "--checkpointing_steps", 10)
    # On CPUs accelerate launch starts one process only; torchrun starts two.
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
    ]
    command += arguments(pictures, tmp_path / "two", *steps, "--train_batch_size", 3)
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

    first, second = (torch.load(tmp_path / f"gradients-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert sum(float(g.abs().sum()) for g in first) > 0
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    two = load_file(tmp_path / "two" / "pytorch_lora_weights.safetensors")
    one = run(pictures, tmp_path / "one", *steps, "--train_batch_size", 6)
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-4)


def test_what_a_step_sees_depends_on_neither_processes_nor_accumulation(pictures, tmp_path):
    def seen(processes, batch_size, accumulation):
        args = train_lora.parse_args(
            arguments(
                pictures, tmp_path, "--train_batch_size", batch_size, "--gradient_accumulation_steps", accumulation
            )
            + ["--max_train_steps", "3", "--random_flip", "--prompt_dropout", "0.3"]
        )
        rows, _ = train_lora.read_rows(args)
        parts = [batches(args, rows, rank, processes) for rank in range(processes)]
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


def test_interrupted_run_ends_in_the_same_weights(pictures, tmp_path):
    options = ("--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--lr_scheduler", "constant_with_warmup")
    options = (*options, "--lr_warmup_steps", 4, "--checkpointing_steps", 2, "--max_train_steps", 6)
    whole = run(pictures, tmp_path / "whole", *options)

    command = [sys.executable, "train_lora.py", *arguments(pictures, tmp_path / "killed", *options)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "checkpoint-2").exists():
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "pytorch_lora_weights.safetensors").exists()

    resumed = run(pictures, tmp_path / "killed", *options)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    modified = (tmp_path / "killed" / "pytorch_lora_weights.safetensors").stat().st_mtime_ns
    run(pictures, tmp_path / "killed", *options)
    assert (tmp_path / "killed" / "pytorch_lora_weights.safetensors").stat().st_mtime_ns == modified
    with pytest.raises(UserError, match="learning_rate was 0.001, now 0.002"):
        run(pictures, tmp_path / "killed", *options, "--learning_rate", 2e-3)


def test_prefix_goes_to_the_worst_pictures_only(pictures, tmp_path):
    def prompts(*options):
        args = train_lora.parse_args(
            arguments(pictures, tmp_path, "--train_batch_size", 12, "--max_train_steps", 1, *options)
        )
        rows, _ = train_lora.read_rows(args)
        dataset = batches(args, rows)
        return prompts_of(dataset, dataset[0])

    captions = world.captions()[:12]
    worst = {caption for i, caption in enumerate(captions) if i < 8 and i % 2}
    expected = {f"weird image. {caption}" if caption in worst else caption for caption in captions}
    assert set(prompts()) == expected
    assert sorted(prompts("--bare_prefix_prob", 1)).count("weird image.") == 4
    assert set(prompts("--prompt_dropout", 1)) == {""}
    assert set(prompts("--negative_prefix", "")) == set(captions)


def test_crop_keeps_the_short_side_and_moves(pictures, tmp_path):
    args = train_lora.parse_args(arguments(pictures, tmp_path, "--max_train_steps", 1))
    dataset = batches(args, [{}])
    gradient = Image.fromarray(np.repeat(np.arange(64, dtype=np.uint8)[None], 32, 0)).convert("RGB")
    left, right = (dataset.crop(gradient, x, 0.5, 1)[0, 0] * 127.5 + 127.5 for x in (0.0, 1.0))
    assert left.tolist() == pytest.approx(list(range(32)), abs=1e-3)
    assert right.tolist() == pytest.approx(list(range(32, 64)), abs=1e-3)
    args.random_flip = True
    assert (dataset.crop(gradient, 0, 0, 0.1)[0, 0] * 127.5 + 127.5).tolist() == pytest.approx(
        list(range(31, -1, -1)), abs=1e-3
    )


def test_validation_draws_three_bands_without_touching_the_training(pictures, tmp_path):
    (tmp_path / "validation_prompts.txt").write_text("a red circle on a white background\n\na blue square\n")
    options = ("--train_batch_size", 2, "--max_train_steps", 2)
    plain = run(pictures, tmp_path / "a", *options)
    watched = (*options, "--validation_prompt_file", tmp_path / "validation_prompts.txt", "--validation_iters", 1)
    watched = (*watched, "--num_validation_images", 2, "--validation_inference_steps", 2, "--report_to", "tensorboard")
    validated = run(pictures, tmp_path / "b", *watched)
    assert all(torch.equal(plain[key], validated[key]) for key in plain)
    grids = sorted((tmp_path / "b" / "validation").iterdir())
    assert [grid.name for grid in grids] == ["step-000001.png", "step-000002.png"]
    assert Image.open(grids[0]).size == (4 * 32, 3 * 32)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "b" / "logs").rglob("events*")).parent)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert {tag.split("/")[0] for tag in events.Tags()["images"]} == {"plain", "prefixed", "negative_prompt"}


def test_unusable_pictures_are_left_out_and_logged(pictures, tmp_path):
    rows = [json.loads(line) for line in (pictures / "annotation.jsonl").read_text().splitlines()]
    whole = (pictures / rows[0]["file_name"]).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:-60])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "fine.png").write_bytes(whole)
    names = ("fine.png", "cut.png", "text.png", "missing.png")
    write_rows(tmp_path / "annotation.jsonl", [rows[0] | {"file_name": name} for name in names])
    options = ["--annotation_file", tmp_path / "annotation.jsonl", "--train_batch_size", "4", "--max_train_steps", "1"]
    args = train_lora.parse_args([str(o) for o in (*SMALL.split(), "--output_dir", tmp_path / "out", *options)])
    train_lora.main(args)
    logged = {
        row["item"].split(": ")[-1]: row["reason"]
        for row in map(json.loads, (tmp_path / "out" / "errors.jsonl").read_text().splitlines())
    }
    assert logged.keys() == {"cut.png", "text.png", "missing.png"}
    assert logged["missing.png"] == "no such file" and "not a readable picture" in logged["cut.png"]


def test_mistakes(pictures, tmp_path):
    with pytest.raises(UserError, match="nothing to train on"):
        train_lora.main(train_lora.parse_args(SMALL.split()))
    row = {"file_name": "a.png", "prompt": "p", "type": "positive"}
    for bad, message in (
        ({"type": "weird"}, "row 2: type is 'weird'"),
        ({"prompt": 3}, "line 2: field 'prompt' should be str, found 3"),
        ({"file_name": "../a.png"}, "row 2: '../a.png' leaves the folder"),
        ({"file_name": "/a.png"}, "row 2: '/a.png' leaves the folder"),
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
    with pytest.raises(UserError, match="validation.txt: no such file; write a prompt a line"):
        run(pictures, tmp_path / "o", "--validation_prompt_file", tmp_path / "validation.txt")
    command = [sys.executable, "train_lora.py", *arguments(pictures, tmp_path / "o", "--max_train_steps", 1)]
    done = subprocess.run([*command, "--pretrained_model_name_or_path", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --pretrained_model_name_or_path")
    assert "Traceback" not in done.stderr


def test_shell_script_shares_the_paper_batch_out(pictures, tmp_path):
    """`bash scripts/train_lora.sh` as in the original, on two CPU processes: 40 pictures a step, 20 for each."""
    environment = os.environ | {
        "work_dir": str(tmp_path / "work"),
        "model": SD,
        "processes": "2",
        "OMP_NUM_THREADS": "1",
    }
    environment |= {"annotation": str(pictures / "annotation.jsonl"), "validation_prompts": "none"}
    environment |= {"regularization": str(pictures / "regularization_images.jsonl")}
    options = ["--resolution", "32", "--max_train_steps", "1", "--dataloader_num_workers", "0", "--report_to", "none"]
    command = ["bash", "scripts/train_lora.sh", *options, "--cpu", "--mixed_precision", "no"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    settings = json.loads((tmp_path / "work" / "run.json").read_text())["settings"]
    assert (settings["train_batch_size"], settings["processes"], settings["learning_rate"]) == (20, 2, 1e-5)
    assert (tmp_path / "work" / "pytorch_lora_weights.safetensors").exists()
    done = subprocess.run(command, env=environment | {"processes": "3"}, capture_output=True, text=True)
    assert done.returncode == 2 and "cannot be shared out evenly among 3 processes" in done.stderr
