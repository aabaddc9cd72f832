"""The classifier's training in the toy world: its first step against the formula, its memory of where it stopped, its mistakes."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import CLIP
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_hpc
from toy import make_data
from utils import hps, preferences
from utils.errors import UserError
from utils.images import open_image
from utils.prompt_batches import PromptBatches

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
    """By the shell script, ten prompts in steps of three: a step's two processes have two prompts and one, in the last step one and none."""
    copy_of(dataset, tmp_path / "data", read(dataset, "train")[:10], read(dataset, "test")[:5])
    one = run(tmp_path / "data", tmp_path / "one.pth", "--batch_size", 3)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvidia-smi").symlink_to("/bin/true")  # no GPUs, so it is torchrun that starts two
    path = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {"OMP_NUM_THREADS": "1", "PATH": path, "processes": "2", "dataset": str(tmp_path / "data")}
    done = subprocess.run(
        ["bash", "scripts/train_hpc.sh", "--output", str(tmp_path / "two.pth"), *SMALL, "--batch_size", "3"],
        env=os.environ | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
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


# --- the step ---


class Spy:
    """Keeps the gradients of every optimizer step."""

    def __init__(self, monkeypatch):
        self.steps, step = [], torch.optim.AdamW.step

        def spy(optimizer, *args, **kwargs):
            self.steps.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])
            return step(optimizer, *args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", spy)

    def gradients(self, dataset, output, *options) -> list[torch.Tensor]:
        self.steps.clear()
        run(dataset, output, "--max_grad_norm", 1e9, *options)
        return self.steps[0]


def test_gradient_is_the_mean_over_prompts_however_they_are_split(dataset, tmp_path, monkeypatch):
    """Prompts of 2 and 4 images: together, one by one, in micro-batches, and with checkpointing in every block."""
    spy = Spy(monkeypatch)
    rows = read(dataset, "train")[:2]
    rows[0]["file_path"], rows[0]["human_preference"] = rows[0]["file_path"][:2], 1
    for name, some in (("both", rows), ("first", rows[:1]), ("second", rows[1:])):
        copy_of(dataset, tmp_path / name, some, rows)
    both = spy.gradients(tmp_path / "both", tmp_path / "a.pth")
    alone = [spy.gradients(tmp_path / name, tmp_path / f"{name}.pth") for name in ("first", "second")]
    micro = spy.gradients(tmp_path / "both", tmp_path / "b.pth", "--micro_batch_size", 1)
    less_memory = spy.gradients(tmp_path / "both", tmp_path / "c.pth", "--gradient_checkpointing")
    assert len(both) > 30 and max(float(g.abs().max()) for g in both) > 1e-3
    for whole, one, two, small, again in zip(both, *alone, micro, less_memory, strict=True):
        torch.testing.assert_close(whole, (one + two) / 2, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(small, whole, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-6)


def copy_of(dataset, folder, train, test):
    folder.mkdir(exist_ok=True)
    write_split(folder, "train", train)
    write_split(folder, "test", test)
    (folder / "preference_images").symlink_to(dataset / "preference_images")


def test_frozen_blocks_build_no_graph():
    """What autograd keeps for the backward pass grows with every block that trains; a frozen block's output has no graph."""
    kept = {}
    for layers in (0, 1, 4):
        scorer = hps.load(model=CLIP[1], pretrained=WEIGHTS)
        train_hpc.unlock(scorer.model, layers, 0)
        graphs, sizes = [], []
        for block in scorer.model.visual.transformer.resblocks:
            block.register_forward_hook(lambda _, __, out, graphs=graphs: graphs.append(out.grad_fn is not None))
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            scorer.model.encode_image(torch.zeros(2, 3, 32, 32))
        assert graphs == [False] * (4 - layers) + [True] * layers
        kept[layers] = sum(sizes)
    block = kept[1] - kept[0]
    assert block > 10 * kept[0] and kept[4] == pytest.approx(kept[0] + 4 * block, rel=0.05)


def test_half_precision_keeps_weights_in_fp32(dataset, tmp_path):
    def run_with(precision):
        AcceleratorState._reset_state(reset_partial_state=True)  # a process has one precision for good
        try:
            return run(dataset, tmp_path / f"{precision}.pth", "--mixed_precision", precision)["state_dict"]
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    exact, half = run_with("no"), run_with("bf16")
    before = hps.read_checkpoint(WEIGHTS)[0]
    key = "visual.transformer.resblocks.3.mlp.c_fc.weight"
    way, apart = (exact[key] - before[key]).norm(), (half[key] - exact[key]).norm()
    assert half[key].dtype == torch.float32 and 0 < apart < 0.5 * way
    assert (half[key].bfloat16().float() != half[key]).float().mean() > 0.9  # nothing has rounded them on the way
    with pytest.raises(UserError, match="--mixed_precision fp16 needs a GPU"):
        run_with("fp16")


def test_loss_scale_of_fp16_goes_on(tmp_path):
    scorer = hps.load(model=CLIP[1], pretrained=WEIGHTS)
    train_hpc.unlock(scorer.model, 4, 2)
    optimizer = train_hpc.make_optimizer(scorer.model, train_hpc.parse_args(SMALL))
    old, new = (
        SimpleNamespace(is_main_process=True, scaler=torch.amp.GradScaler("cpu", init_scale=scale), print=print)
        for scale in (128.0, 65536.0)
    )
    old.scaler.scale(torch.ones(()))
    train_hpc.save_checkpoint(tmp_path / "checkpoint", 7, 0.25, scorer.model, optimizer, old)
    assert train_hpc.load_checkpoint(tmp_path / "checkpoint", scorer.model, optimizer, new) == (7, 0.25)
    assert new.scaler.get_scale() == 128


def test_flips_come_from_the_picture(dataset):
    """About half are mirrored, by epoch and picture, whatever else is in the batch; none by default."""
    args = train_hpc.parse_args([*SMALL, "--random_flip", "--num_train_epochs", "2", "--dataset_folder", str(dataset)])
    plain = train_hpc.parse_args([*SMALL, "--dataset_folder", str(dataset)])
    choices = preferences.read(dataset / "preference_train.json", [])
    scorer = hps.load(model=CLIP[1], pretrained=WEIGHTS)
    accelerator = SimpleNamespace(process_index=0, num_processes=1)
    flipping = PromptBatches(choices, scorer, args, accelerator)
    as_it_is = PromptBatches(choices, scorer, plain, accelerator)
    mirrored = [[], []]
    for i, k in itertools.product(range(16), range(4)):
        image = scorer.preprocess(open_image(choices[i].images[k]))
        assert torch.equal(as_it_is.load(0, i, k), image)
        for epoch in (0, 1):
            got = flipping.load(epoch, i, k)
            mirrored[epoch].append(torch.equal(got, image.flip(-1)))
            assert torch.equal(got, image) != mirrored[epoch][-1]
    assert all(20 < sum(epoch) < 44 for epoch in mirrored) and mirrored[0] != mirrored[1]


# --- tests, trackers, the file ---


def test_best_of_several_tests_is_kept_beside_the_last(dataset, tmp_path, capsys):
    options = "--num_train_epochs 3 --eval_steps 3 --report_to tensorboard --logging_steps 1"
    last = run(dataset, tmp_path / "hpc.pth", *options.split())
    best = torch.load(tmp_path / "hpc.best.pth", weights_only=True)
    events = EventAccumulator(str(next((tmp_path / "hpc.pth.logs").rglob("events.*")).parent)).Reload()
    scalars = {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}
    assert scalars["loss"].keys() == set(range(1, 13)) == scalars["images_per_second"].keys()
    assert scalars["test_accuracy"].keys() == {3, 4, 6, 8, 9, 12} == scalars["test_pairwise_accuracy"].keys()
    assert {0 <= value <= 1 for value in scalars["train_accuracy"].values()} == {True}
    assert scalars["lr"][1] == pytest.approx(1e-3) and scalars["lr"][12] < 1e-4
    tested = scalars["test_accuracy"]
    assert best["test_accuracy"] == pytest.approx(max(tested.values())) and tested[best["step"]] == max(tested.values())
    assert (last["step"], last["test_accuracy"]) == (12, pytest.approx(tested[12]))
    assert hps.load(tmp_path / "hpc.best.pth").config == last["model"]
    assert f"best of 6 tests: {best['test_accuracy']:.4f}" in capsys.readouterr().out


def test_logged_loss_is_that_of_the_choices(dataset, tmp_path):
    """The first step's loss and accuracies, from the scores of the weights that it started from."""
    copy_of(dataset, tmp_path / "data", read(dataset, "train")[:4], read(dataset, "test"))
    run(tmp_path / "data", tmp_path / "hpc.pth", "--report_to", "tensorboard", "--logging_steps", 1)
    events = EventAccumulator(str(next((tmp_path / "hpc.pth.logs").rglob("events.*")).parent)).Reload()
    scorer = hps.load(model=CLIP[1], pretrained=WEIGHTS)
    scale, losses, first, beaten = float(scorer.model.logit_scale.exp()), [], 0, 0
    for row in read(dataset, "train")[:4]:
        images = [dataset / "preference_images" / name for name in row["file_path"]]
        logits, chosen = scale * scorer.score(images, row["prompt"]) / 100, row["human_preference"]
        losses.append(np.log(np.exp(logits - logits[chosen]).sum()))
        first, beaten = first + (logits.argmax() == chosen), beaten + (logits[chosen] > logits).sum()
    for name, value in (
        ("loss", np.mean(losses)),
        ("train_accuracy", first / 4),
        ("train_pairwise_accuracy", beaten / 12),
    ):
        assert events.Scalars(name)[0].value == pytest.approx(value, rel=1e-4), name


def test_padding_stays_with_the_checkpoint(dataset, tmp_path):
    padded = run(dataset, tmp_path / "pad.pth", "--resize", "pad")
    assert padded["resize"] == "pad" and hps.load(tmp_path / "pad.pth").resize == "pad"
    wide = Image.fromarray(np.full((20, 60, 3), 200, np.uint8))
    pixels = hps.load(tmp_path / "pad.pth").preprocess(wide)
    assert torch.equal(pixels[:, 0], hps.load(tmp_path / "pad.pth").preprocess(Image.new("RGB", (32, 32)))[:, 0])
    with pytest.raises(UserError, match="resize 'pad', not with 'crop'"):
        hps.load(tmp_path / "pad.pth", resize="crop")


def test_names_are_those_of_openai_clip(dataset, tmp_path):
    """Written out after the model that OpenAI published; its load_state_dict is strict."""
    block = "attn.in_proj_weight attn.in_proj_bias attn.out_proj.weight attn.out_proj.bias ln_1.weight ln_1.bias ln_2.weight"
    block += " ln_2.bias mlp.c_fc.weight mlp.c_fc.bias mlp.c_proj.weight mlp.c_proj.bias"
    names = "positional_embedding text_projection logit_scale token_embedding.weight ln_final.weight ln_final.bias"
    names += " visual.class_embedding visual.positional_embedding visual.proj visual.conv1.weight"
    names += " visual.ln_pre.weight visual.ln_pre.bias visual.ln_post.weight visual.ln_post.bias"
    blocks = [f"visual.transformer.resblocks.{i}" for i in range(4)] + [f"transformer.resblocks.{i}" for i in range(2)]
    wanted = {*names.split(), *(f"{b}.{name}" for b in blocks for name in block.split())}
    assert run(dataset, tmp_path / "hpc.pth")["state_dict"].keys() == wanted


def test_a_full_disk_is_named_and_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "hpc.pth"
    path.write_bytes(b"earlier")
    train_hpc.temporary(path).symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        train_hpc.save_whole({"weight": torch.ones(1_000_000)}, path)
    assert path.read_bytes() == b"earlier" and list(tmp_path.iterdir()) == [path]
