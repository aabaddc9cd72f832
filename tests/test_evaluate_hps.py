"""evaluate_hps.py against the snippet of the original README, on a tiny classifier with random weights."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import evaluate_hps
from utils import hps, scoring
from utils.errors import UserError, one_line_errors
from utils.images import open_image

TINY = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 4, "width": 64, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}
CAPTIONS = ["a red circle", "a blue square, 4 k", "a red circle", "", "ein Bär 🐻", "a cat", "a dog"]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def world(tmp_path, model) -> Path:
    """A folder with hpc.pth, another.pth, and images/ of seven pictures with their meta.json."""
    torch.save({"state_dict": model.state_dict(), "model": TINY}, tmp_path / "hpc.pth")
    torch.save({"state_dict": {k: v * 1.1 for k, v in model.state_dict().items()}, "model": TINY}, tmp_path / "b.pth")
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(len(CAPTIONS)):
        small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        small.resize((50 + i, 40), Image.Resampling.BICUBIC).save(tmp_path / f"images/{i}.jpg")
    write_meta(tmp_path, [{"file_name": f"{i}.jpg", "caption": caption} for i, caption in enumerate(CAPTIONS)])
    return tmp_path


def write_meta(world: Path, rows: list):
    (world / "images/meta.json").write_text(json.dumps(rows))


def run(world: Path, *flags, meta="images/meta.json", hpc="hpc.pth", capsys=None) -> str | None:
    words = ["--hpc", world / hpc, "--image_folder", world / "images", "--meta_file", world / meta]
    evaluate_hps.main(evaluate_hps.parse_args([*map(str, words), "--num_workers", "0", *map(str, flags)]))
    return capsys.readouterr().out if capsys else None


def printed(out: str) -> tuple[float, int, float]:
    """Return HPS, n and standard error from what was printed."""
    found = re.match(r"HPS: (-?0\.\d{4,})\nn: (\d+), standard error: (\S+)", out)
    return float(found[1]), int(found[2]), float(found[3].strip(","))


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def cosines(world: Path, model, names=(0, 1, 2, 3, 4, 5, 6)) -> list[float]:
    """The original README's snippet, a pair at a time, with open_clip's own preprocess."""
    preprocess, tokenize = open_clip.image_transform(32, is_train=False), open_clip.SimpleTokenizer()
    found = []
    for i in names:
        with torch.no_grad():
            image_features = model.encode_image(preprocess(Image.open(world / f"images/{i}.jpg")).unsqueeze(0))
            text_features = model.encode_text(tokenize([CAPTIONS[i]]))
        image_features = image_features / image_features.norm(dim=-1, keepdim=True)
        text_features = text_features / text_features.norm(dim=-1, keepdim=True)
        found.append((image_features @ text_features.T).item())
    return found


def test_prints_the_mean_cosine_for_any_batch_size(world, model, capsys):
    expected = np.array(cosines(world, model))
    for batch_size in (1, 2, 3, 7, 16):  # 2 and 3 leave a last batch of one
        mean, n, standard_error = printed(run(world, "--batch_size", batch_size, capsys=capsys))
        assert mean == pytest.approx(expected.mean(), abs=2e-6)
        assert n == 7
        assert standard_error == pytest.approx(expected.std(ddof=1) / 7**0.5, abs=2e-6)
    assert not list(world.rglob("*.run.json")) and not list(world.rglob("*.errors.jsonl"))


def test_workers_give_the_same_in_the_same_order(world, model):
    run(world, "--num_workers", 2, "--batch_size", 2, "--output", world / "scores.jsonl")
    rows = read_rows(world / "scores.jsonl")
    assert [(row["file_name"], row["caption"]) for row in rows] == [(f"{i}.jpg", c) for i, c in enumerate(CAPTIONS)]
    assert [row["score"] / 100 for row in rows] == pytest.approx(cosines(world, model), abs=1e-6)


def test_what_workers_need_can_be_pickled(world):
    scorer = hps.load(world / "hpc.pth")
    dataset = scoring.Pictures([world / "images/0.jpg", world / "images/none.jpg"], open_image, scorer.preprocess)
    dataset, collate = pickle.loads(pickle.dumps((dataset, scoring.collate)))
    ((pixels, reasons),) = DataLoader(dataset, batch_size=2, collate_fn=collate)
    assert pixels.shape == (1, 3, 32, 32)
    assert reasons == [None, "no such file"]


def test_reads_json_lines_and_other_names(world, model, capsys):
    rows = [{"file_path": f"{i}.jpg", "prompt": CAPTIONS[i], "seed": i} for i in (3, 1)]
    (world / "meta.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    mean, n, _ = printed(run(world, meta="meta.jsonl", capsys=capsys))
    assert (mean, n) == (pytest.approx(np.mean(cosines(world, model, (3, 1))), abs=2e-6), 2)


def test_one_picture_has_no_standard_error(world, capsys):
    write_meta(world, [{"file_name": "0.jpg", "caption": "a"}])
    assert re.fullmatch(r"HPS: \S+\nn: 1, standard error: nan\n", run(world, capsys=capsys))


def test_a_row_twice_counts_twice_and_is_scored_once(world, model, capsys):
    write_meta(world, [{"file_name": f"{i}.jpg", "caption": CAPTIONS[i]} for i in (0, 0, 1)])
    mean, n, _ = printed(run(world, "--output", world / "scores.jsonl", capsys=capsys))
    assert (mean, n) == (pytest.approx(np.mean(cosines(world, model, (0, 0, 1))), abs=2e-6), 3)
    assert len(read_rows(world / "scores.jsonl")) == 2


def test_a_rerun_keeps_what_is_scored(world, capsys):
    output = world / "new/scores.jsonl"
    whole = run(world, "--output", output, capsys=capsys)
    rows = read_rows(output)
    # As a kill leaves it: three rows, the second one marked here, and a torn fourth.
    rows[1]["score"] += 7
    lines = [json.dumps(row) for row in rows]
    output.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    marked, n, _ = printed(run(world, "--output", output, capsys=capsys))
    assert marked - printed(whole)[0] == pytest.approx(0.07 / 7, abs=2e-6)
    assert n == 7
    again = read_rows(output)
    assert [row["file_name"] for row in again] == [row["file_name"] for row in rows]
    assert [row["score"] for row in again] == pytest.approx([row["score"] for row in rows], abs=1e-4)
    # A row that lacks nothing but its newline is torn too.
    output.write_text("\n".join(lines))
    run(world, "--output", output)
    assert len(read_rows(output)) == 7
    # The record says what the scores were made with.
    record = json.loads((world / "new/scores.jsonl.run.json").read_text())
    assert record["settings"]["precision"] == "fp32" and record["n"] == 7


def test_scores_of_other_settings_are_refused(world):
    output = world / "scores.jsonl"
    run(world, "--output", output)
    before = output.read_text()
    for flags, hpc, named in (
        ((), "b.pth", "checkpoint_sha256 was"),
        (("--precision", "fp16"), "hpc.pth", "precision was 'fp32', now 'fp16'"),
        (("--resize", "pad"), "hpc.pth", "resize was 'crop', now 'pad'"),
    ):
        with pytest.raises(UserError, match=named):
            run(world, "--output", output, *flags, hpc=hpc)
    assert output.read_text() == before
    run(world, "--output", output, "--overwrite", hpc="b.pth")
    assert len(read_rows(output)) == 7 and output.read_text() != before

    # Neither are new pictures given the scores of old ones, nor is somebody else's file added to.
    later = output.stat().st_mtime + 5
    os.utime(world / "images/3.jpg", (later, later))
    with pytest.raises(UserError, match=r"3\.jpg and 0 more changed since they were scored"):
        run(world, "--output", output, hpc="b.pth")
    (world / "notes.jsonl").write_text('{"mine": 1}\n')
    with pytest.raises(UserError, match=r"notes\.jsonl: there is no notes\.jsonl\.run\.json"):
        run(world, "--output", world / "notes.jsonl")
    assert (world / "notes.jsonl").read_text() == '{"mine": 1}\n'


def test_pictures_that_do_not_decode_stop_it_or_are_skipped(world, model, capsys):
    (world / "images/2.jpg").write_bytes((world / "images/2.jpg").read_bytes()[:300])
    (world / "images/4.jpg").unlink()
    (world / "images/5.jpg").write_text("<html>")
    with pytest.raises(SystemExit), one_line_errors():
        run(world, "--batch_size", 1)
    last = capsys.readouterr().err.splitlines()[-1]  # the bar has a line of its own
    assert re.match(r"error: \S+2\.jpg: not a readable picture: .*--skip_errors", last)
    output = world / "scores.jsonl"
    for _ in range(2):  # a rerun tries them again, and lists them once
        out = run(world, "--skip_errors", "--output", output, "--batch_size", 1, capsys=capsys)
        mean, n, _ = printed(out)
        assert (mean, n) == (pytest.approx(np.mean(cosines(world, model, (0, 1, 3, 6))), abs=2e-6), 4)
        assert f", skipped: 3, see {output}.errors.jsonl" in out
        errors = read_rows(world / "scores.jsonl.errors.jsonl")
        assert [(row["item"], row["stage"]) for row in errors] == [(f"{i}.jpg", "decode") for i in (2, 4, 5)]
        assert errors[1]["reason"] == "no such file"
    # One that was mended is scored by the rerun.
    Image.new("RGB", (40, 40)).save(world / "images/4.jpg")
    assert printed(run(world, "--skip_errors", "--output", output, capsys=capsys))[1] == 5
    # Without an output, the list stands beside the meta file.
    run(world, "--skip_errors")
    assert len(read_rows(world / "images/meta.json.errors.jsonl")) == 2

    write_meta(world, [{"file_name": "5.jpg", "caption": "a"}])
    with pytest.raises(UserError, match="none of the 1 pictures can be decoded"):
        run(world, "--skip_errors")


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ("[]", "there is no picture in it"),
        ("", "there is no picture in it"),
        ('{"file_name": "0.jpg", "caption": "a"}\n{"file_name": "0.jpg"}\n', "line 2: no field 'caption'"),
        ('[{"file_name": "0.jpg", "caption": 3}]', "element 0: field 'caption' should be str, found 3"),
        ('[{"image": "0.jpg", "caption": "a"}]', "element 0: no field 'file_name'"),
        ("[1]", "element 0: expected an object"),
        ("[{]", "not valid JSON"),
        ('[{"file_name": "../hpc.pth", "caption": "a"}]', r"row 1: '\.\./hpc\.pth' leads out of the image folder"),
        ('[{"file_name": "a/../../b", "caption": "a"}]', "leads out of the image folder"),
        ('[{"file_name": "/etc/hostname", "caption": "a"}]', "leads out of the image folder"),
    ],
)
def test_a_bad_meta_file_is_refused(world, meta, said):
    (world / "meta.jsonl").write_text(meta)
    with pytest.raises(UserError, match=rf"meta\.jsonl: .*{said}"):
        run(world, "--output", world / "scores.jsonl", meta="meta.jsonl")
    assert sorted(path.name for path in world.iterdir()) == ["b.pth", "hpc.pth", "images", "meta.jsonl"]


def test_a_classifier_of_nans_is_refused(world, model):
    broken = {key: value * float("nan") for key, value in model.state_dict().items()}
    torch.save({"state_dict": broken, "model": TINY}, world / "nan.pth")
    with pytest.raises(UserError, match=r"nan\.pth: gives scores that are no numbers"):
        run(world, "--skip_errors", "--output", world / "scores.jsonl", hpc="nan.pth")
    assert (world / "scores.jsonl").read_text() == ""


def test_bad_flags_are_refused(world, tmp_path):
    for flags in (["--batch_size", 0], ["--device", "toaster"], ["--model", "ViT-B-32"]):
        with pytest.raises(UserError):
            run(world, *flags)
    with pytest.raises(UserError, match=r"nowhere\.json: no such file"):
        run(world, meta="nowhere.json")
    with pytest.raises(UserError, match=r"meta\.json: not a checkpoint"):
        run(world, hpc="images/meta.json")
    with pytest.raises(UserError, match="elsewhere: no such folder"):
        run(world, "--image_folder", world / "elsewhere")


def test_the_command_line_ends_with_one_line_and_exit_code_2(world):
    words = ["--hpc", "hpc.pth", "--image_folder", "images", "--meta_file", "nowhere.json"]
    done = subprocess.run(
        [sys.executable, Path(evaluate_hps.__file__), *words], cwd=world, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: nowhere.json: no such file\n"
