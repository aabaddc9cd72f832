"""The classifier's training in the toy world: its first step against the formula, its memory of where it stopped, its mistakes."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
from conftest import CLIP

import train_hpc
from toy import make_data
from utils import hps
from utils.errors import UserError
from utils.images import open_image

WEIGHTS = str(make_data.MODEL.parent / "clip.safetensors")
SMALL = f"""{" ".join(CLIP)} --pretrained {WEIGHTS} --unlocked_image_layers 4 --unlocked_text_layers 2 --num_workers 0
    --learning_rate 1e-3 --batch_size 4 --cpu --mixed_precision no --report_to none""".split()


def run(dataset, output, *options) -> dict:
    arguments = ["--dataset_folder", dataset, "--output", output, *SMALL, *options]
    train_hpc.main(train_hpc.parse_args([str(option) for option in arguments]))
    return torch.load(output, weights_only=True)


@pytest.fixture
def dataset(small_world):
    return small_world / "dataset"


def read(dataset, split):
    return json.loads((dataset / f"preference_{split}.json").read_text())


def write_split(folder, split, rows):
    (folder / f"preference_{split}.json").write_text(json.dumps(rows))


def test_loss_is_softmax_cross_entropy_within_the_prompt(dataset, tmp_path):
    """One step on prompts of 2, 3 and 4 images; the gradient by the formula gives AdamW's first step, lr * sign."""
    rows = read(dataset, "train")[:3]
    for row, count in zip(rows, (2, 3, 4), strict=True):
        row["file_path"], row["human_preference"] = row["file_path"][:count], row["human_preference"] % count
    write_split(tmp_path, "train", rows)
    write_split(tmp_path, "test", rows)
    (tmp_path / "preference_images").symlink_to(dataset / "preference_images")
    after = run(tmp_path, tmp_path / "hpc.pth", "--max_grad_norm", 1e9, "--weight_decay", 0)["state_dict"]

    scorer = hps.load(model=CLIP[1], pretrained=WEIGHTS)
    before = {name: p.detach().clone() for name, p in scorer.model.named_parameters()}
    losses = []
    for row in rows:
        pixels = torch.stack(
            [scorer.preprocess(open_image(dataset / "preference_images" / n)) for n in row["file_path"]]
        )
        image, text = scorer.model.encode_image(pixels), scorer.model.encode_text(scorer.tokenizer([row["prompt"]]))
        cosines = (image @ text[0]) / (image.norm(dim=1) * text.norm())
        weights = torch.exp(scorer.model.logit_scale.exp() * cosines)
        losses.append(-torch.log(weights[row["human_preference"]] / weights.sum()))
    (sum(losses) / 3).backward()
    moved = 0
    for name, parameter in scorer.model.named_parameters():
        if parameter.grad is None or not parameter.grad.any() or name == "logit_scale":
            continue
        step = torch.where(parameter.grad.abs() > 1e-6, -1e-3 * parameter.grad.sign(), torch.nan)
        certain = ~step.isnan() & torch.ne(after[name], before[name])
        torch.testing.assert_close(after[name][certain], (before[name] + step)[certain], rtol=0, atol=1e-4)
        moved += int(certain.sum())
    assert moved > 10_000


def test_frozen_blocks_stay_and_the_rest_moves(dataset, tmp_path):
    options = ("--unlocked_image_layers", 1, "--unlocked_text_layers", 1)
    after = run(dataset, tmp_path / "hpc.pth", *options)["state_dict"]
    before = hps.read_checkpoint(WEIGHTS)[0]
    moved = {name for name in before if not torch.equal(after[name].float(), before[name].float())}
    trained = ("visual.transformer.resblocks.3.", "transformer.resblocks.1.", "visual.ln_post.", "ln_final.")
    trained = (*trained, "visual.proj", "text_projection", "logit_scale")
    assert moved == {name for name in before if name.startswith(trained)}


def test_checkpoint_is_the_released_format(dataset, tmp_path, capsys):
    hpc = run(dataset, tmp_path / "hpc.pth", "--num_train_epochs", 2)
    names = open_clip.create_model("ViT-B-32-quickgelu").state_dict().keys()
    assert {name for name in hpc["state_dict"] if "resblocks" not in name} == {n for n in names if "resblocks" not in n}
    assert hpc["model"]["embed_dim"] == 32 and hpc["options"]["num_train_epochs"] == 2

    # The accuracy it reports is what the stored classifier reaches, counted here by hand.
    scorer = hps.load(tmp_path / "hpc.pth")
    rows = read(dataset, "test")
    right = 0
    for row in rows:
        scores = scorer.score([dataset / "preference_images" / name for name in row["file_path"]], row["prompt"])
        right += int(np.argmax(scores) == row["human_preference"])
    assert hpc["test_accuracy"] == right / len(rows)
    assert f"test accuracy: {right / len(rows):.4f}" in capsys.readouterr().out


def test_killed_run_ends_in_the_same_weights(dataset, tmp_path):
    options = ("--num_train_epochs", 3, "--checkpointing_steps", 2)
    whole = run(dataset, tmp_path / "whole.pth", *options)
    arguments = ["--dataset_folder", dataset, "--output", tmp_path / "killed.pth", *SMALL, *options]
    process = subprocess.Popen(
        [sys.executable, "train_hpc.py", *map(str, arguments)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    while not (tmp_path / "killed.pth.checkpoint").exists():
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not (tmp_path / "killed.pth").exists()
    resumed = run(dataset, tmp_path / "killed.pth", *options)
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name])
    assert not (tmp_path / "killed.pth.checkpoint").exists()
    with pytest.raises(UserError, match="num_train_epochs was 3, now 1"):
        run(dataset, tmp_path / "killed.pth", "--checkpointing_steps", 2)


def test_two_processes_end_where_one_does(dataset, tmp_path):
    """Ten prompts in global batches of four: the last step has two, one for each process."""
    for split, count in (("train", 10), ("test", 5)):
        write_split(tmp_path, split, read(dataset, split)[:count])
    (tmp_path / "preference_images").symlink_to(dataset / "preference_images")
    one = run(tmp_path, tmp_path / "one.pth")
    # On CPUs accelerate launch starts one process only; torchrun starts two.
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "train_hpc.py",
    ]
    command += ["--dataset_folder", str(tmp_path), "--output", str(tmp_path / "two.pth"), *SMALL]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = torch.load(tmp_path / "two.pth", weights_only=True)
    # AdamW turns the rounding of gradients that are nearly zero into steps of either sign, so the whole way is compared.
    before = hps.read_checkpoint(WEIGHTS)[0]
    way, apart = (
        sum(float((a[name].float() - b[name].float()).square().sum()) for name in before) ** 0.5
        for a, b in ((one["state_dict"], before), (one["state_dict"], two["state_dict"]))
    )
    assert apart < 0.02 * way
    assert two["test_accuracy"] == one["test_accuracy"]


def test_learns_who_is_preferred(dataset, tmp_path):
    """On its own training prompts the choice becomes the top score."""
    write_split(tmp_path, "train", read(dataset, "train"))
    write_split(tmp_path, "test", read(dataset, "train"))
    (tmp_path / "preference_images").symlink_to(dataset / "preference_images")
    assert run(tmp_path, tmp_path / "hpc.pth", "--num_train_epochs", 25)["test_accuracy"] >= 0.75


def test_unusable_prompts_are_dropped_and_logged(dataset, tmp_path):
    rows = read(dataset, "train")[:6]
    (tmp_path / "preference_images").mkdir()
    for row in rows:
        for name in row["file_path"]:
            (tmp_path / "preference_images" / name).write_bytes((dataset / "preference_images" / name).read_bytes())
    (tmp_path / "preference_images" / rows[1]["file_path"][0]).unlink()
    broken = tmp_path / "preference_images" / rows[2]["file_path"][3]
    broken.write_bytes(broken.read_bytes()[:400])
    rows[3]["file_path"], rows[3]["human_preference"] = rows[3]["file_path"][:1], 0
    for split in ("train", "test"):
        write_split(tmp_path, split, rows)
    run(tmp_path, tmp_path / "hpc.pth")
    logged = [json.loads(line) for line in (tmp_path / "hpc.pth.errors.jsonl").read_text().splitlines()]
    reasons = {row["item"]: row["reason"] for row in logged}
    for split in ("train", "test"):
        one, two, three = (reasons[f"{tmp_path}/preference_{split}.json: element {i}"] for i in (1, 2, 3))
        assert "no such file" in one and "not a readable picture" in two and "two images" in three
    assert len(logged) == 6
    record = json.loads((tmp_path / "hpc.pth.run.json").read_text())
    assert (record["train_prompts"], record["dropped_prompts"]) == (3, 6)


def test_mistakes(dataset, tmp_path):
    fine = read(dataset, "train")[0]
    for bad, message in (
        ({"human_preference": 4}, "element 1: human_preference 4 is no index of its 4 images"),
        ({"human_preference": "0"}, "element 1: field 'human_preference' should be int, found '0'"),
        ({"human_preference": -1}, "element 1: human_preference -1"),
        ({"file_path": ["../x.jpg", "y.jpg"], "human_preference": 0}, "element 1: the path '../x.jpg' leaves"),
        ({"prompt": None}, "element 1: field 'prompt' should be str, found None"),
    ):
        write_split(tmp_path, "train", [fine, fine | bad])
        with pytest.raises(UserError, match=message):
            run(tmp_path, tmp_path / "hpc.pth")
    write_split(tmp_path, "train", [])
    with pytest.raises(UserError, match="preference_train.json: no usable prompts"):
        run(tmp_path, tmp_path / "hpc.pth")
    with pytest.raises(UserError, match="preference_train.json: no such file"):
        run(tmp_path / "nowhere", tmp_path / "hpc.pth")
    assert not list(tmp_path.glob("hpc.pth*"))


def test_schedule_is_warmup_then_cosine():
    assert train_hpc.schedule(0, 100, 0) == 1
    assert train_hpc.schedule(50, 100, 0) == pytest.approx(0.5)
    assert train_hpc.schedule(100, 100, 0) == pytest.approx(0)
    assert train_hpc.schedule(0, 100, 10) == pytest.approx(0.1)
    assert train_hpc.schedule(55, 100, 10) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 2))
