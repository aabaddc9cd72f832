"""process_diffusiondb.py on small parts and a small classifier of random weights."""

import io
import itertools
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hub_stand_in import Hub
from parts import CONFIG, encode, read_rows, write_checkpoint, write_part, write_parts, write_zip
from PIL import Image, ImageFilter

import process_diffusiondb as stage
from toy import world
from utils import hps
from utils.errors import UserError, one_line_errors

ROOT = Path(__file__).parent.parent


def run(tmp_path, *options, parts="parts", meta="meta.jsonl", workers=0):
    command = ["--clip_checkpoint", tmp_path / "hpc.pth", "--source_dataset", tmp_path / parts]
    command += ["--meta_file", tmp_path / meta, "--num_workers", workers, *options]
    stage.main(stage.parse_args(list(map(str, command))))
    return tmp_path / meta


@pytest.fixture
def world_path(tmp_path):
    """A folder of three parts, 15 images each, and a classifier."""
    write_parts(tmp_path / "parts")
    write_checkpoint(tmp_path / "hpc.pth")
    return tmp_path


def test_rows_are_what_the_formula_says(world_path):
    meta = run(world_path)

    # The classifier as open_clip itself runs it, one image and one prompt at a time.
    saved = torch.load(world_path / "hpc.pth")
    name = hps.find_model(CONFIG)[0]
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.load_state_dict(saved["state_dict"])
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()

    expected, undecodable = [], []
    for number in (2, 3, 4):
        with zipfile.ZipFile(world_path / "parts" / f"part-{number:06d}.zip") as archive:
            index = json.loads(archive.read(f"part-{number:06d}.json"))
            for position, (image, entry) in enumerate(index.items()):
                try:
                    picture = Image.open(io.BytesIO(archive.read(image))).convert("RGB")
                except OSError:
                    undecodable.append(f"part-{number:06d}.zip/{image}")
                    continue
                with torch.no_grad():
                    a = model.encode_image(preprocess(picture)[None])[0].double()
                    b = model.encode_text(tokenizer(entry["p"]))[0].double()
                cosine = (a @ b / (a.norm() * b.norm())).item()
                row = {"id": number * 1_000_000 + position, "prompt": entry["p"], "score": 100 * cosine}
                row |= {"blurry": position == 1, "part": number, "image": image}
                expected.append(row)
    rows = read_rows(meta)
    assert len({row.pop("pixels") for row in rows}) == len(rows) == 42
    scores = [row.pop("score") for row in rows]
    assert scores == pytest.approx([row.pop("score") for row in expected], abs=1e-3)
    assert scores == [round(score, 4) for score in scores] and np.std(scores) > 0.1
    assert rows == expected

    errors = read_rows(f"{meta}.errors.jsonl")
    assert [error["item"] for error in errors] == undecodable and len(errors) == 3
    assert all(error["stage"] == "decode" and "not a readable picture" in error["reason"] for error in errors)
    record = json.loads(Path(f"{meta}.run.json").read_text())
    assert (record["images"], record["blurry"], record["errors"], record["failed_parts"]) == (42, 3, 3, 0)
    assert len(record["settings"]["checkpoint_sha256"]) == 64


def test_same_bytes_for_any_number_of_ranks_and_workers(world_path):
    outputs = []
    for world_size, workers in [(1, 0), (1, 2), (2, 1), (3, 0)]:
        name = f"{world_size}-{workers}.jsonl"
        for rank in reversed(range(world_size)):  # the last one to finish merges, whichever it is
            assert not (world_path / name).exists()
            run(world_path, "--world_size", world_size, "--rank", rank, meta=name, workers=workers)
        outputs.append([(world_path / f"{name}{end}").read_bytes() for end in ("", ".errors.jsonl")])
    assert all(output == outputs[0] for output in outputs)

    # More ranks than parts, and another batch size: the same but for rounding.
    run(world_path, "--world_size", 9, "--rank", 8, meta="3-0.jsonl")
    for batch_size in (1, 4):
        other = read_rows(run(world_path, "--batch_size", batch_size, meta=f"batch-{batch_size}.jsonl"))
        for row, reference in zip(other, map(json.loads, outputs[0][0].splitlines()), strict=True):
            assert row.pop("score") == pytest.approx(reference.pop("score"), abs=1.1e-4)
            assert row == reference


FORKS = multiprocessing.get_context("forkserver")  # processes that need not import everything anew
FORKS.set_forkserver_preload(["test_process_diffusiondb", "utils.hps"])


def start(*arguments, **options):
    process = FORKS.Process(target=run_alone, args=arguments, kwargs=options)
    process.start()
    return process


def run_alone(*arguments, **options):
    multiprocessing.set_start_method("fork", force=True)  # for the workers, as when it is started from a shell
    torch.set_num_threads(1)
    run(*arguments, **options)


def test_goes_on_after_kill_9_at_any_moment(tmp_path, kills=5):
    write_parts(tmp_path / "parts", numbers=range(2, 10))
    write_checkpoint(tmp_path / "hpc.pth")
    reference = run(tmp_path, meta="reference.jsonl")
    start(tmp_path, meta="warm.jsonl").join()
    started = time.time()
    start(tmp_path, meta="timed.jsonl").join()
    seconds = time.time() - started

    rng, interrupted = np.random.default_rng(), 0
    for kill in range(kills):
        meta = tmp_path / f"{kill}.jsonl"
        process = start(tmp_path, meta=meta.name, workers=int(kill == 2))
        process.join((kill + rng.random()) / kills * seconds)
        process.kill()
        process.join()
        interrupted += not meta.exists()
        done = {path: path.stat().st_mtime_ns for path in tmp_path.glob(f"{meta.name}.parts/part-??????.jsonl")}
        run(tmp_path, meta=meta.name)
        assert all(path.stat().st_mtime_ns == made for path, made in done.items())
        for end in ("", ".errors.jsonl"):
            assert Path(f"{meta}{end}").read_bytes() == Path(f"{reference}{end}").read_bytes()
        assert not list(tmp_path.glob(f"{meta.name}.parts/zips"))
    assert interrupted


def test_ranks_at_the_same_time_and_one_that_dies(tmp_path):
    write_parts(tmp_path / "parts", numbers=range(2, 10))
    write_checkpoint(tmp_path / "hpc.pth")
    reference = run(tmp_path, meta="reference.jsonl").read_bytes()

    def start_ranks(meta):
        return [start(tmp_path, "--world_size", 3, "--rank", rank, meta=meta) for rank in range(3)]

    for process in start_ranks("meta.jsonl"):
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "meta.jsonl").read_bytes() == reference

    ranks = start_ranks("other.jsonl")
    while not (tmp_path / "other.jsonl.parts" / "part-000003.jsonl").exists():
        time.sleep(0.001)
    ranks[1].kill()
    for process in ranks:
        process.join()
    assert not (tmp_path / "other.jsonl").exists()
    for rank in (0, 1):
        run(tmp_path, "--world_size", 2, "--rank", rank, meta="other.jsonl")
    assert (tmp_path / "other.jsonl").read_bytes() == reference


def test_a_full_disk_is_one_line_and_what_is_there_stays(world_path, capsys):
    """A file of rows that is a link to /dev/full has a full disk."""
    reference = run(world_path, meta="reference.jsonl")
    folder = world_path / "meta.jsonl.parts"
    folder.mkdir()
    full = folder / f".part-000003.jsonl.{os.uname().nodename}.{os.getpid()}.tmp"
    full.symlink_to("/dev/full")
    with pytest.raises(SystemExit) as caught, one_line_errors():
        run(world_path)
    printed = capsys.readouterr().err.splitlines()[-1]
    named = f"error: {folder / 'part-000003.jsonl'}: No space left on device"
    assert caught.value.code == 2 and printed.startswith(named)
    assert {path.name for path in folder.glob("part-??????.jsonl")} == {"part-000002.jsonl"}
    assert run(world_path).read_bytes() == reference.read_bytes()


def test_parts_come_from_a_failing_hub_and_go_again(tmp_path, monkeypatch, capfd):
    write_parts(tmp_path / "hub" / "images", numbers=(2, 3, 4, 5, 6))
    write_checkpoint(tmp_path / "hpc.pth")
    reference = run(tmp_path, parts="hub/images", meta="reference.jsonl")
    left_behind = tmp_path / "meta.jsonl.parts" / "zips" / "0" / "part.incomplete"
    left_behind.parent.mkdir(parents=True)
    left_behind.touch()
    hub_options = ["--source_dataset", "2m:2-6", "--cache_dir", tmp_path / "cache"]
    with Hub(tmp_path / "hub") as hub, monkeypatch.context() as patch:
        hub.use(patch)
        hub.faults["images/part-000002.zip"] = ["drop"]
        hub.faults["images/part-000003.zip"] = ["cut", "damage"]
        hub.faults["images/part-000004.zip"] = ["503"]
        hub.refusals["images/part-000005.zip"] = ["503"]
        meta = run(tmp_path, *hub_options, workers=1)
        assert "SHA-256" in (said := capfd.readouterr().err) and said.count("trying again") >= 2
        assert not any(hub.faults.values()) and not any(hub.refusals.values()) and not hub.tokens
        for end in ("", ".errors.jsonl"):
            assert Path(f"{meta}{end}").read_bytes() == Path(f"{reference}{end}").read_bytes()
        assert not list((tmp_path / "cache").rglob("part-*")) and not Path(f"{meta}.parts", "zips").exists()

        run(tmp_path, *hub_options, "--keep_parts", "--prefetch_parts", 0, meta="kept.jsonl")
        assert len(list((tmp_path / "cache").rglob("part-*.zip"))) == 5
    # Kept ones need not come again, and stay.
    offline = run(tmp_path, *hub_options, meta="offline.jsonl")
    assert offline.read_bytes() == reference.read_bytes()
    assert len(list((tmp_path / "cache").rglob("part-*.zip"))) == 5


def test_no_more_parts_lie_on_disk_than_asked_for(tmp_path, monkeypatch):
    write_parts(tmp_path / "hub" / "images", numbers=range(2, 12))
    write_checkpoint(tmp_path / "hpc.pth")
    most, finish_part = 0, stage.finish_part

    def count_and_finish(*arguments):
        nonlocal most
        most = max(most, len(list((tmp_path / "meta.jsonl.parts" / "zips").rglob("part-*.zip"))))
        finish_part(*arguments)

    monkeypatch.setattr(stage, "finish_part", count_and_finish)
    with Hub(tmp_path / "hub") as hub:
        hub.use(monkeypatch)
        monkeypatch.chdir(tmp_path)
        run(tmp_path, "--source_dataset", "2m:2-11", "--prefetch_parts", 3, "--meta_file", "meta.jsonl")
    assert 2 <= most <= 3 + 3  # ahead, in work, being finished, and the next one asked for


def test_refuses_to_mix_and_overwrites_on_request(world_path):
    meta = run(world_path)
    before = meta.read_bytes()
    with pytest.raises(UserError, match="blur_threshold was 10, now 20"):
        run(world_path, "--blur_threshold", 20)
    write_parts(world_path / "others", seed=1)
    with pytest.raises(UserError, match="source_dataset was"):
        run(world_path, parts="others")
    with pytest.raises(UserError, match="precision was 'fp32', now 'fp16'"):
        run(world_path, "--precision", "fp16")
    write_checkpoint(world_path / "hpc.pth", seed=1)
    with pytest.raises(UserError, match="checkpoint_sha256 was"):
        run(world_path)
    assert meta.read_bytes() == before

    run(world_path, "--overwrite")
    fresh = run(world_path, meta="fresh.jsonl")
    assert meta.read_bytes() == fresh.read_bytes() != before
    Path(f"{meta}.run.json").unlink()
    with pytest.raises(UserError, match="of unknown origin"):
        run(world_path)


def test_overwriting_by_several_ranks_leaves_nothing_old(world_path):
    meta = run(world_path)
    for seed in (1, 2):
        write_checkpoint(world_path / "hpc.pth", seed)
        run(world_path, "--overwrite", "--world_size", 2, "--rank", 0)
        assert not meta.exists()
        run(world_path, "--world_size", 2, "--rank", 1)
        assert meta.read_bytes() == run(world_path, "--overwrite", meta="fresh.jsonl").read_bytes()
        Path(f"{meta}.run.json").unlink()


def test_parts_that_cannot_be_read_are_one_error_each_until_they_are_mended(world_path):
    reference = run(world_path, meta="reference.jsonl")
    broken = world_path / "parts" / "part-000003.zip"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    write_zip(world_path / "parts" / "part-000005.zip", {"a.webp": b"x"})
    meta = run(world_path, meta="meta.jsonl")
    assert [row["part"] for row in read_rows(meta)] == [2] * 14 + [4] * 14
    errors = read_rows(f"{meta}.errors.jsonl")
    assert [(error["item"], error["stage"]) for error in errors if "/" not in error["item"]] == [
        ("part-000003.zip", "open"),
        ("part-000005.zip", "open"),
    ]
    assert json.loads(Path(f"{meta}.run.json").read_text())["failed_parts"] == 2

    broken.write_bytes(whole)
    (world_path / "parts" / "part-000005.zip").unlink()
    run(world_path)
    for end in ("", ".errors.jsonl"):
        assert Path(f"{meta}{end}").read_bytes() == Path(f"{reference}{end}").read_bytes()


def test_strange_images_and_prompts_do_not_stop_the_others(tmp_path):
    write_checkpoint(tmp_path / "hpc.pth")
    rng = np.random.default_rng(0)
    picture = world.render("a red circle on a white background", rng)
    animation = io.BytesIO()
    picture.save(animation, "WEBP", lossless=True, save_all=True, append_images=[picture.rotate(90)])
    bomb = Image.new("1", (20000, 20000))
    sliver = Image.new("RGB", (20000, 10), "white")  # thin, but not too thin for a model of 32 pixels
    hair = Image.new("RGB", (200000, 1), "white")
    good = {
        "plain.webp": encode(picture),
        "rgba.png": encode(picture.convert("RGBA"), "PNG"),
        "palette.png": encode(picture.convert("P"), "PNG"),
        "la.png": encode(picture.convert("LA"), "PNG"),
        "cmyk.jpg": encode(picture.convert("CMYK"), "JPEG"),
        "grey16.png": encode(Image.fromarray(rng.integers(0, 65536, (32, 32)).astype(np.uint16)), "PNG"),
        "animated.webp": animation.getvalue(),
        "sliver.png": encode(sliver, "PNG"),
        "dot.png": encode(Image.new("RGB", (1, 1)), "PNG"),
        "line.png": encode(Image.new("RGB", (1, 90)), "PNG"),
    }
    bad = {
        "hair.png": encode(hair, "PNG"),
        "bomb.png": encode(bomb, "PNG"),
        "empty.webp": b"",
        "text.webp": b"<html>",
        "cut.webp": encode(picture)[:50],
        "cut.png": encode(picture, "PNG")[:-400],
    }
    mixed = [item for pair in itertools.zip_longest(bad.items(), good.items()) for item in pair if item]
    prompts = itertools.cycle(["", "x" * 20000, "🐱 " * 200, 'a "quoted"\nprompt\t\\', "naïve \u2028 "])
    entries = [(name, next(prompts), content) for name, content in mixed]
    path = write_part(tmp_path / "parts", 2, entries)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    index = {"absent.webp": {"p": ""}, "../outside.webp": {"p": ""}} | json.loads(members["part-000002.json"])
    members |= {"../outside.webp": b"x", "not-listed.webp": b"x"}
    members["zip-bomb.webp"] = bytes(stage.diffusiondb.MAX_IMAGE_BYTES + 1)
    members["part-000002.json"] = json.dumps(index | {"zip-bomb.webp": {"p": ""}}).encode()
    write_zip(path, members)
    meta = run(tmp_path, workers=2)
    rows = read_rows(meta)
    assert [(row["image"], row["prompt"]) for row in rows] == [(name, p) for name, p, _ in entries if name in good]
    assert all(np.isfinite(row["score"]) for row in rows)
    errors = read_rows(f"{meta}.errors.jsonl")
    reasons = {error["item"].removeprefix("part-000002.zip").removeprefix("/"): error["reason"] for error in errors}
    undecodable = [name for name, _, _ in entries if name in bad]
    assert list(reasons) == ["absent.webp", "../outside.webp", "", *undecodable, "zip-bomb.webp"]
    assert "absent from the zip" in reasons["absent.webp"] and "plain file name" in reasons["../outside.webp"]
    assert reasons[""].startswith("1 members of the zip") and "declares" in reasons["zip-bomb.webp"]
    assert "too long and thin" in reasons["hair.png"] and "bomb" in reasons["bomb.png"]
    assert reasons["text.webp"] == reasons["empty.webp"] == "not a readable picture: in no known format"
    assert all("\n" not in reason and "Traceback" not in reason for reason in reasons.values())

    # The same picture in another file is known as the same; other pictures are not.
    pixels = {row["image"]: row["pixels"] for row in rows}
    assert pixels["plain.webp"] == pixels["rgba.png"] == pixels["animated.webp"] != pixels["la.png"]
    blurry = {row["image"] for row in rows if row["blurry"]}
    assert blurry == {"dot.png", "line.png", "sliver.png"}


def test_scores_that_are_no_numbers_are_errors(world_path):
    saved = torch.load(world_path / "hpc.pth")
    saved["state_dict"]["text_projection"][:] = float("nan")
    torch.save(saved, world_path / "hpc.pth")
    meta = run(world_path)
    assert read_rows(meta) == []
    assert sum(error["stage"] == "score" for error in read_rows(f"{meta}.errors.jsonl")) == 42


def edge(left: int, right: int, turned: bool) -> Image.Image:
    pixels = np.full((24, 32, 3), left, np.uint8)
    pixels[:, 16:] = right
    image = Image.fromarray(pixels)
    return image.transpose(Image.Transpose.ROTATE_90) if turned else image


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("left, right", [(0, 255), (255, 0), (100, 110), (110, 100)])
def test_a_sharp_edge_is_not_blurry_in_any_direction(left, right, turned):
    assert not stage.is_blurry(edge(left, right, turned), 10)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("left, right", [(100, 109), (109, 100), (0, 0), (255, 255)])
def test_a_soft_edge_is_blurry_in_every_direction(left, right, turned):
    assert stage.is_blurry(edge(left, right, turned), 10)


def test_blur_agrees_with_a_plain_loop():
    rng = np.random.default_rng(0)
    sharp = world.render("a blue square on a black background", rng).resize((96, 96))
    for radius in (0, 1, 2, 4, 8, 16):
        image = sharp.filter(ImageFilter.GaussianBlur(radius))
        grey = np.asarray(image.convert("L")).astype(int)
        steps = [abs(grey[y, x] - grey[y, x + 1]) for y in range(96) for x in range(95)]
        steps += [abs(grey[y, x] - grey[y + 1, x]) for y in range(95) for x in range(96)]
        for threshold in (max(steps), max(steps) + 1):
            assert stage.is_blurry(image, threshold) == (max(steps) < threshold)
    assert stage.is_blurry(image, 10) and not stage.is_blurry(sharp, 10)
    assert stage.is_blurry(Image.new("RGB", (1, 1)), 10)


def test_workers_may_be_spawned(world_path):
    scorer = hps.load(world_path / "hpc.pth")
    pictures = pickle.loads(pickle.dumps(stage.Pictures(scorer.preprocess, 10)))
    args = stage.parse_args(["--clip_checkpoint", "", "--batch_size", "4"])
    part, path, rows = next(
        stage.batches(stage.diffusiondb.find_parts(world_path / "parts"), args, world_path / "zips")
    )
    found, pixels, errors = pictures[part, path, rows]
    assert (len(found), pixels.shape, len(errors)) == (3, (3, 3, 32, 32), 1)
    assert pickle.loads(pickle.dumps(stage.as_it_is)) is stage.as_it_is


def test_mistakes_are_one_line_and_exit_code_2(world_path, capsys):
    write_zip(world_path / "unnamed" / "pictures.zip", {})
    (world_path / "note.txt").write_text("not a checkpoint")
    (world_path / "file").touch()
    mistakes = {
        "no such file": ["--clip_checkpoint", world_path / "absent.pth"],
        "not a checkpoint": ["--clip_checkpoint", world_path / "note.txt"],
        "neither a folder nor a subset": ["--source_dataset", "large_first_1g"],
        "not named like": ["--source_dataset", world_path / "unnamed"],
        "made with the model": ["--model", "ViT-B-32"],
        "--rank 2 and --world_size 2": ["--rank", "2", "--world_size", "2"],
        "--batch_size is at least 1": ["--batch_size", "0"],
        "Not a directory": ["--meta_file", world_path / "file" / "meta.jsonl"],
    }
    for said, options in mistakes.items():
        with pytest.raises(SystemExit) as caught, one_line_errors():
            run(world_path, *options)
        printed = capsys.readouterr().err
        assert caught.value.code == 2 and printed.startswith("error: ") and printed.count("\n") == 1 and said in printed
    assert not list(world_path.glob("meta.jsonl*"))
    command = [sys.executable, ROOT / "process_diffusiondb.py", "--clip_checkpoint", "x", "--source_dataset", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --source_dataset nowhere: neither")
    assert done.stderr.count("\n") == 1
