"""Accuracy on human choices: against loops written out by hand, in every released format, interrupted and shared out."""

import io
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CLIP
from PIL import Image

import evaluate_preference
from toy import make_data
from utils import hps, preferences
from utils.errors import UserError

WEIGHTS = str(make_data.MODEL.parent / "clip.safetensors")
PLAIN = [*CLIP, "--pretrained", WEIGHTS, "--num_workers", "0", "--device", "cpu", "--resamples", "200"]


def run(*arguments):
    evaluate_preference.main(evaluate_preference.parse_args([str(argument) for argument in arguments]))


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def without_scores(path) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "scores"} for row in rows_of(path)]


def results_of(path) -> dict:
    return json.loads(Path(f"{path}.run.json").read_text())["results"]


@pytest.fixture
def dataset(small_world, tmp_path):
    """The small world's choices with prompts of 2, 3 and 4 images, and more prompts with names."""
    rows = json.loads((small_world / "dataset" / "preference_test.json").read_text())
    for i, row in enumerate(rows):
        count = 2 + i % 3
        row["file_path"], row["human_preference"] = row["file_path"][:count], row["human_preference"] % count
        row["contain_name"] = i < 3
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "preference_test.json").write_text(json.dumps(rows))
    (tmp_path / "dataset" / "preference_images").symlink_to(small_world / "dataset" / "preference_images")
    return tmp_path / "dataset"


@pytest.fixture
def answers(monkeypatch):
    """Scores by prompt in place of a model's; the pictures are still found and decoded."""
    given = {}

    def score(model, choices, args, show):
        for choice in choices:
            reason = preferences.why_unusable(choice)
            yield (None if reason else given[choice.prompt]), reason

    monkeypatch.setattr(evaluate_preference, "score", score)
    return given


def picture(kind="JPEG", shade=0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 9), (shade, 0, 0)).save(file, kind)
    return file.getvalue()


def write_pictures(folder: Path, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture("WEBP" if name.endswith("webp") else "JPEG"))


def test_accuracy_of_a_real_model(dataset, tmp_path, capsys):
    run(*PLAIN, "--dataset_folder", dataset, "--output", tmp_path / "out.jsonl")
    scorer = hps.load(model=CLIP[1], pretrained=WEIGHTS)
    first = beaten = pairs = chance = 0
    subsets = {}
    choices = json.loads((dataset / "preference_test.json").read_text())
    rows = rows_of(tmp_path / "out.jsonl")
    for row, choice in zip(rows, choices, strict=True):
        images = [dataset / "preference_images" / name for name in choice["file_path"]]
        scores, chosen = scorer.score(images, choice["prompt"]).tolist(), choice["human_preference"]
        assert row["scores"]["clip.safetensors"] == pytest.approx(scores, abs=1e-4)
        assert (row["prompt"], row["images"]) == (choice["prompt"], [str(image) for image in images])
        right = scores.index(max(scores)) == chosen
        others = scores[:chosen] + scores[chosen + 1 :]
        first, beaten, pairs = first + right, beaten + sum(scores[chosen] > s for s in others), pairs + len(others)
        chance += 1 / len(scores) / len(choices)
        names = "prompts with names" if choice["contain_name"] else "prompts without names"
        for subset in (f"{len(scores)} images", names):
            subsets.setdefault(subset, []).append(right)
    results = results_of(tmp_path / "out.jsonl")
    top1 = {row["subset"]: row for row in results["top1"]}
    assert top1["all"]["models"][0][0] == pytest.approx(first / len(choices))
    assert top1["all"]["chance"] == pytest.approx(chance)
    assert results["pairwise"][0]["models"][0][0] == pytest.approx(beaten / pairs)
    assert top1.keys() == {"all", *subsets}
    for subset, rights in subsets.items():
        assert (top1[subset]["n"], top1[subset]["models"][0][0]) == (len(rights), pytest.approx(np.mean(rights)))
    said = capsys.readouterr().out
    assert f"{100 * first / len(choices):.1f} % (" in said and f"{100 * chance:.1f} %" in said


# --- released formats: files made by hand, accuracies counted by hand ---


def test_hpd_v2(tmp_path, answers):
    """test.json: of 3 ranked images two of three pairs in order; then the best is last: 0 of 1. train.json: 1 and 0."""
    test = [
        {"prompt": "a cat", "image_path": ["1.jpg", "2.jpg", "3.jpg"], "rank": [1, 0, 2], "raw_annotations": []},
        {"prompt": "a dog", "image_path": ["4.jpg", "5.jpg"], "rank": [0, 1]},
    ]
    train = [{"prompt": "a cow", "file_path": ["6.jpg", "7.jpg"], "human_preference": [0, 1], "user_hash": "x"}]
    for name, rows in (("test", test), ("train", train)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        write_pictures(tmp_path / name, [f for row in rows for f in row.get("image_path") or row["file_path"]])
    answers |= {"a cat": [0.5, 0.9, 0.7], "a dog": [0.1, 0.2], "a cow": [3.0, 4.0]}
    run("--data_file", tmp_path / "test.json", "--output", tmp_path / "out")
    results = results_of(tmp_path / "out")
    assert results["top1"][0]["models"][0][0] == 1 / 2 and results["top1"][0]["chance"] == (1 / 3 + 1 / 2) / 2
    assert (results["pairwise"][0]["models"][0][0], results["pairwise"][0]["n"]) == (2 / 4, 4)
    run("--data_file", tmp_path / "train.json", "--output", tmp_path / "out2")
    assert results_of(tmp_path / "out2")["top1"][0]["models"][0][0] == 1


def test_imagereward(tmp_path, answers):
    """The pair of equal ranks does not count; of the other 5, in order are 0-1, 0-2, 0-3 and 2-3, not 1-3."""
    names = [f"part-1/images/0040/{i}.webp" for i in range(4)]
    rows = [{"id": "005658-0040", "prompt": "a portal", "generations": names, "ranking": [1, 2, 2, 5]}]
    rows.append({"id": "005658-0041", "prompt": "two firsts", "generations": names[:3], "ranking": [1, 1, 2]})
    (tmp_path / "test.json").write_text(json.dumps(rows))
    write_pictures(tmp_path / "test_images", names)
    answers |= {"a portal": [9.0, 1.0, 5.0, 3.0], "two firsts": [2.0, 1.0, 0.0]}
    run("--data_file", tmp_path / "test.json", "--output", tmp_path / "out")
    results = results_of(tmp_path / "out")
    assert (results["pairwise"][0]["models"][0][0], results["pairwise"][0]["n"]) == (pytest.approx(6 / 7), 7)
    assert results["top1"][0]["models"][0][0] == (1 + 0.5) / 2  # one of two first places


def test_pickapic(tmp_path, answers):
    """Ties count half; what has no label is left out; a broken picture drops its row. In two row groups."""
    rows = [
        {"caption": "right", "label_0": 1.0, "label_1": 0.0, "has_label": True},
        {"caption": "tie", "label_0": 0.5, "label_1": 0.5, "has_label": True},
        {"caption": "none", "label_0": None, "label_1": None, "has_label": False},
        {"caption": "wrong", "label_0": 0.0, "label_1": 1.0, "has_label": True},
        {"caption": "broken", "label_0": 0.0, "label_1": 1.0, "has_label": True},
    ]
    for i, row in enumerate(rows):
        row |= {
            "jpg_0": picture(shade=i),
            "jpg_1": picture(shade=100 + i)[: 90 if row["caption"] == "broken" else None],
        }
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet", row_group_size=3)
    choices = preferences.read(tmp_path / "test.parquet", [])
    shades = [[preferences.open_choice(image).getpixel((4, 4))[0] for image in choice.images] for choice in choices[:3]]
    assert np.abs(np.array(shades) - [[0, 100], [1, 101], [3, 103]]).max() <= 2
    answers |= {"right": [2.0, 1.0], "tie": [1.0, 3.0], "wrong": [2.0, 1.0]}
    run("--data_file", tmp_path / "test.parquet", "--output", tmp_path / "out")
    results = results_of(tmp_path / "out")
    for measured in ("top1", "pairwise"):
        assert (results[measured][0]["models"][0][0], results[measured][0]["n"]) == ((1 + 0.5 + 0) / 3, 3)
    reasons = [row["reason"] for row in rows_of(tmp_path / "out.errors.jsonl")]
    assert len(reasons) == 2 and reasons[0] == "it has no label" and "jpg_1 of row 1" in reasons[1]


def test_agreement_is_the_expectation_over_ties():
    """Against drawing one of the tied, in every order of three images."""
    for scores in itertools.product((1.0, 2.0, 3.0), repeat=3):
        for ranks in itertools.product((1, 2, 3), repeat=3):
            choice = preferences.Choice("", "", ["a", "b", "c"], list(ranks))
            top1, right, pairs = preferences.agreement(list(scores), choice)
            tops = [i for i in range(3) if scores[i] == max(scores)]
            best = [i for i in range(3) if ranks[i] == min(ranks)]
            assert top1 == pytest.approx(np.mean([i == j for i in tops for j in best]))
            ordered = [(i, j) for i in range(3) for j in range(3) if ranks[i] < ranks[j]]
            assert pairs == len(ordered)
            assert right == sum(1.0 if scores[i] > scores[j] else 0.5 * (scores[i] == scores[j]) for i, j in ordered)


# --- intervals ---


def test_intervals_are_the_binomials_and_differences_are_paired():
    rng = np.random.default_rng(0)
    n = 1500
    a, b = (rng.random(n) < 0.4).astype(float), (rng.random(n) < 0.5).astype(float)
    got = evaluate_preference.bootstrap([a, a, b], np.ones(n), 1000, seed=1)
    for (value, low, high), sample in zip(got["ratios"], (a, a, b), strict=True):
        half = 1.96 * np.sqrt(sample.mean() * (1 - sample.mean()) / n)
        assert value == pytest.approx(sample.mean())
        assert (low, high) == pytest.approx((value - half, value + half), abs=0.15 * half)
    assert got["differences"][0] == [0, 0, 0]
    value, low, high = got["differences"][1]
    half = 1.96 * (b - a).std() / np.sqrt(n)
    assert (value, high - low) == (pytest.approx(b.mean() - a.mean()), pytest.approx(2 * half, rel=0.15))


def test_a_prompt_that_comes_often_is_one_prompt():
    """Every row four times is no more evidence; the interval would be half as wide if rows were resampled."""
    rng = np.random.default_rng(0)
    args = evaluate_preference.parse_args(["--resamples", "500"])
    choices = [preferences.Choice("", f"prompt {i}", ["a", "b"], [0, 1]) for i in range(200)]
    counts = np.array([[right, right, 1] for right in (rng.random(200) < 0.6).astype(float)])
    once = evaluate_preference.measure(choices, [counts], args)["top1"][0]["models"][0]
    often = evaluate_preference.measure(choices * 4, [np.tile(counts, (4, 1))], args)["top1"][0]["models"][0]
    assert often == pytest.approx(once)


# --- interruptions, processes, mistakes ---


def test_interrupted_and_shared_out_it_writes_the_same(dataset, tmp_path, monkeypatch, capsys):
    """Killed at a random place with a torn last line, then by two ranks in turn: the same output, nothing scored twice."""
    torch.save(
        {"state_dict": hps.read_checkpoint(WEIGHTS)[0], "model": json.loads(Path(CLIP[1]).read_text())},
        tmp_path / "hpc.pth",
    )
    options = ["--hpc", tmp_path / "hpc.pth", *PLAIN[2:], "--model", CLIP[1], "--dataset_folder", dataset]
    run(*options, "--output", tmp_path / "whole.jsonl")
    table = capsys.readouterr().out
    assert "B - A" in table and "+0.0 % (+0.0 to +0.0)" in table  # the two are the same weights
    part, rng = Path("parts", "rank-0.jsonl"), random.Random(5)
    content = (tmp_path / "whole.jsonl.parts" / part.name).read_bytes()
    assert content.count(b"\n") == 16
    cut = rng.randrange(len(content))
    scored = []
    inner = preferences.score

    def counting(choices, *rest):
        scored.append(len(choices))
        return inner(choices, *rest)

    monkeypatch.setattr(preferences, "score", counting)
    (tmp_path / "cut.jsonl.parts").mkdir()
    (tmp_path / "cut.jsonl.parts" / part.name).write_bytes(content[:cut])
    (tmp_path / "cut.jsonl.run.json").write_bytes((tmp_path / "whole.jsonl.run.json").read_bytes())
    run(*options, "--output", tmp_path / "cut.jsonl")
    assert sum(scored) == 16 - content[:cut].count(b"\n")

    scored.clear()
    for rank in (1, 0):
        run(*options, "--output", tmp_path / "two.jsonl", "--rank", rank, "--world_size", 2)
        assert (tmp_path / "two.jsonl").exists() == (rank == 0)
    run(*options, "--output", tmp_path / "two.jsonl")
    assert sum(scored) == 16
    for name in ("cut.jsonl", "two.jsonl"):
        assert without_scores(tmp_path / name) == without_scores(tmp_path / "whole.jsonl")
        for row, other in zip(rows_of(tmp_path / name), rows_of(tmp_path / "whole.jsonl"), strict=True):
            for label, scores in row["scores"].items():  # the batches were others
                assert scores == pytest.approx(other["scores"][label], abs=1e-4)
    with pytest.raises(UserError, match="precision was 'fp32', now 'fp16'"):
        run(*options, "--output", tmp_path / "two.jsonl", "--precision", "fp16")


def test_a_broken_picture_drops_its_prompt_until_it_is_mended(dataset, tmp_path, answers):
    rows = json.loads((dataset / "preference_test.json").read_text())[:3]
    folder = tmp_path / "other"
    write_pictures(folder / "preference_images", [name for row in rows for name in row["file_path"]])
    (folder / "preference_test.json").write_text(
        json.dumps([*rows, rows[1], rows[0] | {"id": 1, "file_path": ["a.jpg"], "human_preference": 0}])
    )
    bad = folder / "preference_images" / rows[2]["file_path"][1]
    good = bad.read_bytes()
    bad.write_bytes(good[:50])
    answers |= {row["prompt"]: list(range(len(row["file_path"]))) for row in rows}
    run("--dataset_folder", folder, "--output", tmp_path / "out")
    reasons = {row["item"].split(": ")[1]: row["reason"] for row in rows_of(tmp_path / "out.errors.jsonl")}
    assert f"{bad.name}: not a readable picture" in reasons["element 2"]
    assert reasons["element 3"] == f"has the id {rows[1]['id']} of element 1"
    assert reasons["element 4"] == "a choice needs two images"
    bad.write_bytes(good)
    run("--dataset_folder", folder, "--output", tmp_path / "out")
    assert len(rows_of(tmp_path / "out")) == 3 and len(rows_of(tmp_path / "out.errors.jsonl")) == 2


def test_mistakes(dataset, tmp_path):
    def refused(*arguments) -> str:
        with pytest.raises(UserError) as error:
            run(*arguments)
        return str(error.value)

    data = ("--data_file", tmp_path / "x.json")
    for rows, message in (
        ([], "no usable prompts"),
        (
            [{"prompt": "a", "image_path": ["1.jpg", "2.jpg"], "rank": [0]}],
            "element 0: field 'rank' should have a number",
        ),
        ([{"prompt": "a", "generations": ["/etc/x", "2.jpg"], "ranking": [1, 2]}], "'/etc/x' leaves"),
        ([{"prompt": "a", "file_path": ["1.jpg", "2.jpg"]}], "element 0: no field 'human_preference'"),
        ([{"prompt": "a", "file_path": ["1.jpg"], "human_preference": 0}], "the first one: .* two images"),
        ({}, "expected a JSON array"),
    ):
        (tmp_path / "x.json").write_text(json.dumps(rows))
        with pytest.raises(UserError, match=message):
            run(*data)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    assert "x.parquet: not a parquet file" in refused("--data_file", tmp_path / "x.parquet")
    pq.write_table(pa.table({"caption": ["a"]}), tmp_path / "x.parquet")
    assert "no column jpg_0, jpg_1, label_0, label_1" in refused("--data_file", tmp_path / "x.parquet")
    options = ("--dataset_folder", dataset)
    assert "--model: give one for all" in refused(*options, "--hpc", "a.pth", "--model", "x", "y")
    assert "give --output" in refused(*options, "--hpc", "a.pth", "--rank", "0", "--world_size", "2")
    assert "the same classifier twice" in refused(*options, "--hpc", "a.pth", "a.pth")
    assert "nowhere.pth: no such file" in refused(*options, "--hpc", tmp_path / "nowhere.pth")
    done = subprocess.run(
        [sys.executable, "evaluate_preference.py", "--dataset_folder", str(tmp_path)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "preference_test.json: no such file" in done.stderr
