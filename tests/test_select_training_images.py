"""select_training_images.py: the rule, by hand and by a plain loop, and the images that it saves."""

import html.parser
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_stand_in import Hub
from parts import encode, read_rows, write_checkpoint, write_part, write_parts, write_rows
from PIL import Image

import process_diffusiondb
import select_training_images as stage
from utils import hub as hub_files
from utils import scored_rows
from utils.errors import UserError, one_line_errors

ROOT = Path(__file__).parent.parent

# Four prompts, worked out by hand below.
SCORES = {
    "a cat": [20.0, 21.0, 23.0, 20.5],
    "a dog": [19.0, 21.0, 21.5, 21.2, 20.8],
    "a cow": [18.0, 25.0, 18.0],
    "a hen": [20.0, 20.0, 20.0, 20.0],
}


def color(i: int) -> tuple[int, int, int]:
    """Return the colour of picture i: no two are near each other."""
    return (i * 67 % 256, i * 101 % 256, i * 37 % 256)


def write_source(folder: Path, scores=SCORES, parts=(2, 3), contents=None) -> list[dict]:
    """Write parts of plain pictures, picture i in color(i) and in part i mod N; return the rows of their meta file."""
    rows, entries = [], {part: [] for part in parts}
    for prompt, values in scores.items():
        for score in values:
            i, part = len(rows), parts[len(rows) % len(parts)]
            content = (contents or {}).get(i) or encode(Image.new("RGB", (16, 16), color(i)))
            row = {"id": part * 1_000_000 + len(entries[part]), "prompt": prompt, "score": score, "blurry": False}
            entries[part].append((f"{i:04d}.webp", prompt, content))
            rows.append(row | {"part": part, "image": f"{i:04d}.webp"})
    for part, images in entries.items():
        write_part(folder, part, images)
    return rows


def run(tmp_path, *options, output="annotation.jsonl", source="source", meta="meta.jsonl", workers=0) -> Path:
    place = (tmp_path / output).parent
    command = ["--meta_file", tmp_path / meta, "--output_meta", tmp_path / output, "--num_workers", workers]
    command += ["--positive_folder", place / "positive", "--negative_folder", place / "negative"]
    command += ["--source_dataset", tmp_path / source] if source else []
    stage.main(stage.parse_args(list(map(str, [*command, *options]))))
    return tmp_path / output


def picture_number(path: Path) -> int:
    """Return the number of the picture that a file shows, by its colour."""
    shown = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).mean(0)
    distances = [np.abs(shown - color(i)).max() for i in range(64)]
    assert min(distances) <= 3
    return int(np.argmin(distances))


def chosen(annotation: Path) -> set[tuple]:
    """Return (prompt, type, picture) of every row of an annotation, looking at the pictures themselves."""
    rows = read_rows(annotation)
    return {(row["prompt"], row["type"], picture_number(annotation.parent / row["file_name"])) for row in rows}


def test_the_rule_by_hand(tmp_path):
    write_rows(tmp_path / "meta.jsonl", write_source(tmp_path / "source"))
    annotation = run(tmp_path)
    # a cat: exp(-3) + exp(-2) + 1 + exp(-2.5) = 1.267207, so p = 0.789137 > 2/4: a positive.
    #        downwards 1 + exp(-1) + exp(-3) + exp(-0.5) = 2.024197, so p = 0.494023 < 2/4: no negative.
    # a dog: exp(-2.5) + exp(-0.5) + 1 + exp(-0.3) + exp(-0.7) = 2.926019, so p = 0.341761 < 2/5: no positive.
    #        downwards 1 + exp(-2) + exp(-2.5) + exp(-2.2) + exp(-1.8) = 1.493523, so p = 0.669558 > 2/5: a negative.
    # a cow: three images only. a hen: every p = 1/4.
    assert read_rows(annotation) == [
        {
            "id": 2000001,
            "file_name": "positive/000002-0002.webp.jpg",
            "prompt": "a cat",
            "type": "positive",
            "confidence": pytest.approx(0.789137, abs=2e-6),
            "batch_size": 4,
        },
        {
            "id": 2000002,
            "file_name": "negative/000002-0004.webp.jpg",
            "prompt": "a dog",
            "type": "negative",
            "confidence": pytest.approx(0.669558, abs=2e-6),
            "batch_size": 5,
        },
    ]
    assert chosen(annotation) == {("a cat", "positive", 2), ("a dog", "negative", 4)}
    record = json.loads(Path(f"{annotation}.run.json").read_text())
    assert {key: record[key] for key in ("rows", "in_prompts_with_too_few", "prompts", "positive", "negative")} == {
        "rows": 16, "in_prompts_with_too_few": 3, "prompts": 3, "positive": 1, "negative": 1,
    }  # fmt: skip


def test_options_of_the_rule(tmp_path):
    write_rows(tmp_path / "meta.jsonl", write_source(tmp_path / "source"))
    three = run(tmp_path, "--min_images", 3, output="three.jsonl")
    assert chosen(three) == {("a cat", "positive", 2), ("a dog", "negative", 4), ("a cow", "positive", 10)}
    loose = run(tmp_path, "--threshold", 1.7, "--overwrite", output="three.jsonl")
    assert chosen(loose) == {
        ("a cat", "positive", 2), ("a cat", "negative", 0), ("a dog", "positive", 6), ("a dog", "negative", 4),
    }  # fmt: skip


def test_blurry_images_do_not_count(tmp_path):
    rows = write_source(tmp_path / "source", {"a cat": [20.0, 21.0, 23.0, 20.5, 28.0], "a dog": [20.0, 20, 20, 25]})
    rows[4]["blurry"] = rows[8]["blurry"] = True  # the best of each; three dogs are left
    write_rows(tmp_path / "meta.jsonl", rows)
    annotation = run(tmp_path)
    assert chosen(annotation) == {("a cat", "positive", 2)}
    assert read_rows(annotation)[0]["batch_size"] == 4


def test_agrees_with_a_plain_loop(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {
            "id": i,
            "prompt": f"prompt {rng.integers(400)}",
            "score": round(float(rng.normal(20, 1)), 1),  # rounded, so that there are ties
            "blurry": bool(rng.random() < 0.1),
            "part": int(rng.integers(2, 9)),
            "image": f"{i}.webp",
        }
        for i in range(3000)
    ]
    meta = scored_rows.read(write_rows(tmp_path / "meta.jsonl", rows))
    args = stage.parse_args([])
    groups, _ = stage.group_by_prompt(meta, args)
    found = stage.choose(meta, stage.stand_out(groups, +1), "positive", None, args)
    found += stage.choose(meta, stage.stand_out(groups, -1), "negative", None, args)

    prompts = {}
    for row in sorted(rows, key=lambda row: (row["part"], row["image"])):
        if not row["blurry"]:
            prompts.setdefault(row["prompt"], []).append(row)
    expected = []
    for prompt, group in prompts.items():
        for kind, sign in (("positive", 1), ("negative", -1)):
            weights = [math.exp(sign * (row["score"] - 20)) for row in group]
            p = max(weights) / sum(weights)
            if len(group) >= 4 and p > 2 / len(group):
                winner = group[weights.index(max(weights))]
                expected.append((prompt, kind, winner["part"], winner["image"], len(group), p))
    found = sorted((w["prompt"], w["type"], w["part"], w["image"], w["batch_size"], w["confidence"]) for w in found)
    assert [row[:5] for row in found] == [row[:5] for row in sorted(expected)] and len(expected) > 200
    assert [row[5] for row in found] == pytest.approx([row[5] for row in sorted(expected)], abs=1e-6)


def test_shuffled_merged_renumbered_and_filtered_meta_files_choose_the_same_images(tmp_path):
    scores = {f"prompt {k}": np.random.default_rng(k).normal(20, 2, 5).round(4).tolist() for k in range(12)}
    rows = write_source(tmp_path / "source", scores, parts=(2, 5, 3))
    write_rows(tmp_path / "meta.jsonl", rows)
    expected = chosen(run(tmp_path))
    assert len(expected) > 10

    shuffled = random.Random(0).sample(rows, len(rows))
    changed = {
        "shuffled": shuffled,
        "merged": shuffled[:40] + rows,  # with rows that are in both
        "renumbered": [row | {"id": i // 2} for i, row in enumerate(shuffled)],
        "filtered": [row for row in shuffled if row["prompt"] not in ("prompt 0", "prompt 7")],
    }
    for name, other in changed.items():
        write_rows(tmp_path / f"{name}.jsonl", other)
        found = chosen(run(tmp_path, meta=f"{name}.jsonl", output=f"{name}/annotation.jsonl"))
        left = {row["prompt"] for row in other}
        assert found == {choice for choice in expected if choice[0] in left}


def test_repeated_pictures_are_one_picture(tmp_path):
    rows = write_source(tmp_path / "source", {"a cat": [20.0, 21, 23, 20.5, 23], "a dog": [20.0, 20, 20, 25]})
    for row in rows:
        row["pixels"] = row["image"]
    rows[4]["pixels"] = rows[2]["pixels"]  # without this, the two best cats share their p
    rows[6]["pixels"] = rows[5]["pixels"]  # three different dogs are left
    write_rows(tmp_path / "meta.jsonl", rows)
    annotation = run(tmp_path)
    assert chosen(annotation) == {("a cat", "positive", 2)}
    assert read_rows(annotation)[0]["batch_size"] == 4


def test_black_pictures_are_never_chosen_and_counted(tmp_path):
    """The picture that is nothing but black has the best score of its prompt; what annotates it says so."""
    pictures = [Image.new("RGB", (32, 32), (i * 9, 255 - i * 9, 40)) for i in range(5)]
    for picture in pictures[:4]:
        picture.paste("white", (0, 0, 16, 32))
    pictures[4] = Image.new("RGB", (48, 32))
    entries = [(f"{i}.webp", "a cat", encode(picture)) for i, picture in enumerate(pictures)]
    entries.append(("5.webp", "a cat", encode(Image.new("RGB", (32, 32), (90, 90, 90)))))
    write_part(tmp_path / "source", 2, entries)
    write_checkpoint(tmp_path / "hpc.pth")
    command = ["--clip_checkpoint", tmp_path / "hpc.pth", "--source_dataset", tmp_path / "source", "--num_workers", "0"]
    command += ["--meta_file", tmp_path / "meta.jsonl"]
    process_diffusiondb.main(process_diffusiondb.parse_args(list(map(str, command))))
    rows = read_rows(tmp_path / "meta.jsonl")
    assert [row["pixels"] == "black" for row in rows] == [False] * 4 + [True, False]
    for row, score in zip(rows, [20.0, 21.0, 23.0, 20.5, 29.0, 28.0], strict=True):
        row["score"], row["blurry"] = score, row["image"] == "5.webp"  # whatever else says that black is sharp
    write_rows(tmp_path / "meta.jsonl", rows)
    annotation = run(tmp_path)
    assert [row["file_name"] for row in read_rows(annotation)] == ["positive/000002-2.webp.jpg"]
    record = json.loads(Path(f"{annotation}.run.json").read_text())
    assert (record["black"], record["blurry"], record["images"]) == (1, 1, 4)


def test_prompts_that_differ_in_case_and_space_are_one_if_asked(tmp_path):
    scores = {"A cat": [20.0, 21.0], " a  CAT ": [23.0], "a\tcat": [20.5], "acat": [30.0]}
    write_rows(tmp_path / "meta.jsonl", write_source(tmp_path / "source", scores))
    with pytest.raises(UserError, match="no image has p"):
        run(tmp_path)
    annotation = run(tmp_path, "--normalize_prompts")
    assert chosen(annotation) == {(" a  CAT ", "positive", 2)}
    assert read_rows(annotation)[0]["confidence"] == pytest.approx(0.789137, abs=2e-6)
    record = json.loads(Path(f"{annotation}.run.json").read_text())
    assert (record["merged_prompts"], record["in_prompts_with_too_few"], record["prompts"]) == (2, 1, 1)


def test_report_shows_counts_histograms_and_examples(tmp_path, capsys):
    scores = {f"<b>prompt</b> {k} &": np.random.default_rng(k).normal(20, 2, 5).round(4).tolist() for k in range(40)}
    rows = write_source(tmp_path / "source", scores, contents={3: b"broken"})
    rows[7]["blurry"] = True
    write_rows(tmp_path / "meta.jsonl", rows)
    run(tmp_path, "--dry_run", "--report", tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.jsonl", "report", "source"]

    class Page(html.parser.HTMLParser):
        def __init__(self):
            super().__init__()
            self.images, self.text, self.chosen = [], [], []
            self.feed(page)

        def handle_starttag(self, tag, attributes):
            attributes = dict(attributes)
            assert tag not in ("b", "script")
            if tag == "img":
                self.images.append(attributes["src"])
            self.chosen += [len(self.images)] if attributes.get("class", "").startswith("chosen") else []

        def handle_data(self, data):
            self.text.append(data)

    shown = Page()
    assert {"hps.png", "confidence.png", "images.png"} < set(shown.images)
    assert all(Image.open(tmp_path / "report" / name).width > 0 for name in shown.images)

    # Every count and threshold, by the plain rule.
    groups = {}
    for row in rows:
        if not row["blurry"]:
            groups.setdefault(row["prompt"], []).append(row)
    ratios = {"positive": {}, "negative": {}}
    for prompt, group in groups.items():
        for kind, sign in (("positive", 1), ("negative", -1)):
            weights = [math.exp(sign * (row["score"] - 20)) for row in group]
            ratios[kind][prompt] = max(weights) / sum(weights) * len(weights)
    text = " ".join(shown.text)
    passing = {kind: sum(ratio > 2 for ratio in found.values()) for kind, found in ratios.items()}
    for said in ("200 rows", "1 blurry", "40 prompts", "199 images"):
        assert said in text
    for kind in passing:
        assert f"{passing[kind]} chosen {kind}" in text
        assert f"{40 - passing[kind]} prompts below the threshold {kind}" in text
    assert f"2.00 {passing['positive']} {passing['negative']}" in text

    # The most confident positive comes first, with its four siblings by their scores.
    first = max(ratios["positive"], key=ratios["positive"].get)
    assert first in text and text.index(first) == text.index("<b>prompt</b>")
    siblings = sorted((row for row in rows if row["prompt"] == first and not row["blurry"]), key=lambda r: -r["score"])
    assert shown.images[3 : 3 + len(siblings)] == [f"images/{r['part']:06d}-{r['image']}.jpg" for r in siblings]
    assert shown.chosen[0] == 3


def test_a_report_names_pictures_that_cannot_be_shown(tmp_path):
    rows = write_source(tmp_path / "source", {"a cat": [20.0, 21.0, 23.0, 20.5]}, contents={2: b"broken"})
    rows[1]["part"] = 9
    write_rows(tmp_path / "meta.jsonl", rows)
    run(tmp_path, "--dry_run", "--report", tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert "not a readable picture" in page and "there is no part 9" in page


def test_winners_come_from_the_hub_by_range_requests(tmp_path, monkeypatch, capfd):
    rng = np.random.default_rng(0)
    noise = {i: encode(Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8))) for i in range(120)}
    scores = {f"prompt {k}": [20.0, 20.0, 30.0, 20.0] for k in range(30)}
    rows = write_source(tmp_path / "hub" / "images", scores, contents=noise)
    write_rows(tmp_path / "meta.jsonl", [row for row in rows if row["prompt"] in ("prompt 1", "prompt 2", "prompt 20")])
    zips = sorted((tmp_path / "hub" / "images").iterdir())
    reference = run(tmp_path, source="hub/images")
    pictures = {path.name: path.read_bytes() for path in tmp_path.glob("positive/*.jpg")}
    assert len(pictures) == 3

    with Hub(tmp_path / "hub") as hub:
        hub.use(monkeypatch)
        hub.faults["images/part-000002.zip"] = ["503", "cut", "drop"]
        monkeypatch.setattr(hub_files, "WAITS", (0.01,) * 4)
        monkeypatch.setattr(hub_files, "TAIL", 16 << 10)
        options = ["--source_dataset", "2m:2-3", "--cache_dir", tmp_path / "cache"]
        ranged = run(tmp_path, *options, output="ranged/annotation.jsonl")
        assert not any(hub.faults.values())
        record = json.loads(Path(f"{ranged}.run.json").read_text())
        whole = sum(path.stat().st_size for path in zips)
        assert record["fetched_bytes"] <= hub.fetched() and record["fetched_bytes"] < whole / 5
        assert f"{record['fetched_bytes'] / 1e6:,.1f} MB came from the hub" in capfd.readouterr().out
        assert not list((tmp_path / "cache").rglob("part-*"))
    assert ranged.read_bytes() == reference.read_bytes()
    assert {path.name: path.read_bytes() for path in tmp_path.glob("ranged/positive/*.jpg")} == pictures


def test_winners_of_any_mode_are_saved_right(tmp_path):
    blank = Image.new("RGBA", (16, 16), (*color(2), 255))
    blank.paste((0, 0, 0, 0), (0, 0, 16, 8))  # the upper half is transparent
    palette = Image.new("RGB", (16, 16), color(7)).convert("P", palette=Image.Palette.ADAPTIVE)
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    grey = Image.fromarray(np.full((16, 16), 40000, np.uint16))
    la = Image.new("LA", (16, 16), (90, 0))
    contents = {
        2: encode(blank, "PNG"),
        7: encode(palette, "PNG"),
        10: encode(cmyk, "JPEG", quality=100),
        14: encode(grey, "PNG"),
        18: encode(la, "PNG"),
    }
    scores = {f"prompt {k}": [20.0, 20.0, 30.0, 20.0] for k in range(5)}
    scores["prompt 1"] = [20.0, 20.0, 20.0, 30.0]
    write_rows(tmp_path / "meta.jsonl", write_source(tmp_path / "source", scores, contents=contents))
    rows = read_rows(run(tmp_path))
    pictures = {row["prompt"]: Image.open(tmp_path / row["file_name"]) for row in rows if row["type"] == "positive"}
    assert all(image.mode == "RGB" and image.format == "JPEG" for image in pictures.values())
    expected = [None, color(7), (255, 0, 0), (156, 156, 156), (255, 255, 255)]  # 40000 / 256 = 156
    for k in range(1, 5):
        assert np.abs(np.asarray(pictures[f"prompt {k}"]).astype(int) - expected[k]).max() <= 4
    half = np.asarray(pictures["prompt 0"]).astype(int)
    assert np.abs(half[:7] - 255).max() <= 4 and np.abs(half[9:] - color(2)).max() <= 4


def test_winners_that_cannot_be_read_are_logged_and_dropped(tmp_path):
    scores = {f"prompt {k}": [20.0, 20.0, 30.0, 20.0] for k in range(5)}
    rows = write_source(tmp_path / "source", scores, parts=(2, 3, 4), contents={2: b"broken"})
    rows[6]["part"] = 9  # of a part that is not there
    rows[10]["image"] = "../0010.webp"
    rows[14]["prompt"], rows[12]["prompt"], rows[13]["prompt"], rows[15]["prompt"] = ["another"] * 4
    write_rows(tmp_path / "meta.jsonl", rows)
    annotation = run(tmp_path)
    assert chosen(annotation) == {("prompt 4", "positive", 18)}
    errors = {row["item"]: row["reason"] for row in read_rows(f"{annotation}.errors.jsonl")}
    assert {item: reason.split(":")[0] for item, reason in errors.items()} == {
        "000004-0002.webp": "not a readable picture",
        "000009-0006.webp": f"there is no part 9 in {tmp_path / 'source'}",
        "000003-../0010.webp": "of another prompt in this source, or of none",
        "000004-0014.webp": "of another prompt in this source, or of none",
    }
    with pytest.raises(UserError, match="none of the 5 chosen images can be read"):
        write_source(tmp_path / "empty", {"nothing": [1.0]}, parts=(77,))
        run(tmp_path, source="empty", output="other/annotation.jsonl")


def test_a_rerun_keeps_what_is_there(tmp_path):
    scores = {f"prompt {k}": [20.0, 20.0, 30.0, 20.0, 10.0] for k in range(8)}
    write_rows(tmp_path / "meta.jsonl", write_source(tmp_path / "source", scores))
    annotation = run(tmp_path)
    before = annotation.read_bytes()
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*itive/*.jpg")} | {
        path: path.stat().st_mtime_ns for path in tmp_path.glob("negative/*.jpg")
    }
    assert len(made) == 16
    # As a kill -9 leaves it: no list yet, some pictures missing, one begun under another name.
    annotation.unlink()
    gone = sorted(made)[::3]
    for path in gone:
        path.unlink()
    (tmp_path / "positive" / ".000002-0002.webp.jpg.tmp").write_bytes(b"half")
    run(tmp_path)
    assert annotation.read_bytes() == before
    assert all((path.stat().st_mtime_ns != time) == (path in gone) for path, time in made.items())


def test_refuses_to_mix_and_overwrites_on_request(tmp_path):
    rows = write_source(tmp_path / "source")
    write_rows(tmp_path / "meta.jsonl", rows)
    annotation = run(tmp_path)
    before = annotation.read_bytes()
    with pytest.raises(UserError, match=r"threshold was 2\.0, now 1\.5"):
        run(tmp_path, "--threshold", 1.5)
    with pytest.raises(UserError, match="quality was 95, now 90"):
        run(tmp_path, "--quality", 90)
    with pytest.raises(UserError, match="of unknown origin"):
        run(tmp_path, output="another.jsonl")
    rows[0]["score"] += 9
    write_rows(tmp_path / "meta.jsonl", rows)
    with pytest.raises(UserError, match="meta_sha256 was"):
        run(tmp_path)
    assert annotation.read_bytes() == before
    run(tmp_path, "--overwrite")
    assert chosen(annotation) == {("a cat", "positive", 0), ("a cat", "negative", 3), ("a dog", "negative", 4)}
    assert len(list(tmp_path.glob("positive/*.jpg"))) == 1


@pytest.mark.parametrize(
    "positive, negative, output, expected",
    [
        ("positive", "negative", "annotation.jsonl", "positive/"),
        ("positive/", "negative//", "annotation.jsonl", "positive/"),
        ("./a/b/positive/", "a/c", "annotation.jsonl", "a/b/positive/"),
        ("{tmp}/deep/positive/", "{tmp}/deep/negative/", "annotation.jsonl", "deep/positive/"),
        ("both/", "both", "annotation.jsonl", "both/"),
        ("lists", "lists", "lists/annotation.jsonl", ""),
        ("link/positive", "link/negative", "link/annotation.jsonl", "positive/"),
        ("link/positive", "link/negative", "annotation.jsonl", "link/positive/"),
    ],
)
def test_file_names_lead_to_the_images_from_the_list(tmp_path, monkeypatch, positive, negative, output, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write_rows("meta.jsonl", write_source(Path("source")))
    folders = [folder.format(tmp=tmp_path) for folder in (positive, negative)]
    command = ["--meta_file", "meta.jsonl", "--source_dataset", "source", "--output_meta", output, "--num_workers", "0"]
    stage.main(stage.parse_args([*command, "--positive_folder", folders[0], "--negative_folder", folders[1]]))
    rows = read_rows(output)
    assert rows[0]["file_name"] == f"{expected}000002-0002.webp.jpg"
    assert chosen(Path(output)) == {("a cat", "positive", 2), ("a dog", "negative", 4)}
    for row, folder in zip(rows, folders, strict=True):
        assert os.path.samefile(Path(output).parent / row["file_name"], Path(folder, Path(row["file_name"]).name))


def test_subsamples_are_seeded(tmp_path):
    scores = {f"prompt {k}": [20.0, 20.0, 30.0, 20.0, 10.0] for k in range(12)}
    rows = write_source(tmp_path / "source", scores)
    write_rows(tmp_path / "meta.jsonl", rows)
    everything = chosen(run(tmp_path, output="0/annotation.jsonl"))

    def draw(place, *options):
        return chosen(run(tmp_path, *options, output=f"{place}/annotation.jsonl"))

    one = draw("one", "--num_positive", 5, "--num_negative", 3)
    assert one < everything
    assert [sum(choice[1] == kind for choice in one) for kind in ("positive", "negative")] == [5, 3]
    write_rows(tmp_path / "meta.jsonl", rows[::-1])
    assert draw("two", "--num_positive", 5, "--num_negative", 3) == one
    other = draw("three", "--num_positive", 5, "--num_negative", 3, "--seed", 1)
    assert other < everything and other != one
    assert draw("four", "--num_positive", 100, "--num_negative", 0) == {c for c in everything if c[1] == "positive"}


def test_follows_process_diffusiondb_in_any_number_of_processes(tmp_path):
    write_parts(tmp_path / "parts", images=8)
    write_checkpoint(tmp_path / "hpc.pth")
    command = ["--clip_checkpoint", tmp_path / "hpc.pth", "--source_dataset", tmp_path / "parts"]
    command += ["--meta_file", tmp_path / "meta.jsonl", "--num_workers", "0"]
    process_diffusiondb.main(process_diffusiondb.parse_args(list(map(str, command))))
    outputs = []
    for workers in (0, 2):
        place = tmp_path / str(workers)
        annotation = run(
            tmp_path, "--threshold", 1.1, source=None, workers=workers, output=f"{workers}/annotation.jsonl"
        )
        outputs.append({path.name: path.read_bytes() for path in place.rglob("*") if path.suffix in (".jsonl", ".jpg")})
        meta = {(row["part"], row["image"]): row for row in read_rows(tmp_path / "meta.jsonl")}
        for row in read_rows(annotation):
            part, _, image = Path(row["file_name"]).name.removesuffix(".jpg").partition("-")
            assert (meta[int(part), image]["prompt"], meta[int(part), image]["id"]) == (row["prompt"], row["id"])
    assert outputs[0] == outputs[1] and len(outputs[0]) > 5


def test_dry_run_writes_nothing(tmp_path, capsys):
    rows = write_source(tmp_path / "source")
    write_rows(tmp_path / "meta.jsonl", rows)
    before = sorted(tmp_path.rglob("*"))
    run(tmp_path, "--dry_run")
    assert sorted(tmp_path.rglob("*")) == before
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["16", "rows"] in lines and ["3", "prompts"] in lines and ["13", "images"] in lines
    assert ["2.00", "1", "1"] in [line[:3] for line in lines]
    assert ["1.50", "2", "2"] in [line[:3] for line in lines]


def test_meta_files_in_other_forms(tmp_path):
    rows = write_source(tmp_path / "source")
    expected = scored_rows.read(write_rows(tmp_path / "meta.jsonl", rows)).to_pylist()
    (tmp_path / "array.json").write_text(json.dumps(rows))
    (tmp_path / "torn.jsonl").write_text((tmp_path / "meta.jsonl").read_text() + '{"id": 1, "prom')
    write_rows(tmp_path / "more.jsonl", [row | {"more": [i], "score": int(row["score"])} for i, row in enumerate(rows)])
    assert scored_rows.read(tmp_path / "array.json").to_pylist() == expected
    assert scored_rows.read(tmp_path / "torn.jsonl").to_pylist() == expected
    whole = [row | {"score": float(int(row["score"]))} for row in expected]
    assert scored_rows.read(tmp_path / "more.jsonl").to_pylist() == whole


def test_mistakes_are_one_line_and_exit_code_2(tmp_path, capsys):
    rows = write_source(tmp_path / "source")
    write_rows(tmp_path / "meta.jsonl", rows)
    bad = {
        "wrong.jsonl: line 3: field 'score' should be int or float, found '20'": {"score": "20"},
        "wrong.jsonl: line 3: field 'blurry' should be bool, found 0": {"blurry": 0},
        "wrong.jsonl: line 3: field 'prompt' should be str, found None": {"prompt": None},
        "image 0002.webp of part 2 has the score nan": {"score": math.nan},
        "image 0000.webp of part 2 has two different rows": {"image": "0000.webp"},
    }
    mistakes = [(said, ["--meta_file", tmp_path / f"{i}" / "wrong.jsonl"]) for i, said in enumerate(bad)]
    for (_, (_, path)), change in zip(mistakes, bad.values(), strict=True):
        path.parent.mkdir()
        write_rows(path, [*rows[:2], rows[2] | change, *rows[3:]])
    (tmp_path / "original.jsonl").write_text('{"id": 0, "prompt": "a cat", "score": 20.1, "blurry": false}\n')
    (tmp_path / "broken.jsonl").write_text("{}\nnot json\n")
    (tmp_path / "empty.jsonl").touch()
    mistakes += [
        ("original.jsonl: line 1: no field 'part'", ["--meta_file", tmp_path / "original.jsonl"]),
        ("broken.jsonl: line 1: no field 'id'", ["--meta_file", tmp_path / "broken.jsonl"]),
        ("empty.jsonl: no rows", ["--meta_file", tmp_path / "empty.jsonl"]),
        ("absent.jsonl: no such file", ["--meta_file", tmp_path / "absent.jsonl"]),
        ("neither a folder nor a subset", ["--source_dataset", tmp_path / "absent"]),
        ("--threshold 0.5", ["--threshold", "0.5"]),
        ("--quality from 1 to 100", ["--quality", "101"]),
        ("no image has p > 9 / n", ["--threshold", "9"]),
        ("meta.jsonl", ["--positive_folder", tmp_path / "meta.jsonl"]),
        ("should lie in the folder of --output_meta", ["--positive_folder", tmp_path.parent / "positive"]),
    ]
    for said, options in mistakes:
        with pytest.raises(SystemExit) as caught, one_line_errors():
            run(tmp_path, *options)
        printed = capsys.readouterr().err
        assert caught.value.code == 2 and printed.startswith("error: ") and printed.count("\n") == 1
        assert said in printed
    assert not list(tmp_path.glob("annotation.jsonl")) and not list(tmp_path.glob("*itive/*.jpg"))
    command = [sys.executable, ROOT / "select_training_images.py", "--meta_file", tmp_path / "absent.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == f"error: {tmp_path / 'absent.jsonl'}: no such file\n"
