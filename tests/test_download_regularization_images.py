"""The downloader against a real server on 127.0.0.1 that does what the open web does."""

import csv
import gzip
import hashlib
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from server import Web

import download_regularization_images as stage
from utils.errors import UserError
from utils.url_tables import clean

SCRIPT = Path(stage.__file__)
KILLS = int(os.environ.get("KILLS", "4"))  # kill -9 at so many random moments


def picture(mode="RGB", color=(200, 30, 60), size=(64, 48), kind="PNG") -> bytes:
    buffer = BytesIO()
    Image.new(mode, size, color).save(buffer, kind)
    return buffer.getvalue()


def numbered(i: int) -> bytes:
    """A picture unlike that of any other number below 4096: its bits as black and white squares."""
    bits = np.array([i >> bit & 1 for bit in range(12)], np.uint8).reshape(3, 4) * 255
    buffer = BytesIO()
    Image.fromarray(bits.repeat(16, 0).repeat(16, 1)).save(buffer, "PNG")
    return buffer.getvalue()


def palette_picture() -> bytes:
    image = Image.new("P", (64, 48), 1)
    image.putpalette([0, 0, 0, 10, 200, 40])
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# 40,000 x 40,000 pixels in 57 bytes: a header that would unfold to 4.8 GB, were it decoded.
BOMB = b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    for kind, data in ((b"IHDR", struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b""))
)


@pytest.fixture
def web():
    web = Web()
    yield web
    web.close()


def write_csv(path: Path, rows, columns=("URL", "TEXT", "AESTHETIC_SCORE"), delimiter=",") -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([columns, *rows])
    return path


def run(tmp_path: Path, table: Path, *flags) -> Path:
    """Run the stage with output beside `tmp_path`/out; return the folder of pictures."""
    folder = tmp_path / "out"
    common = [
        "--urls",
        table,
        "--output_folder",
        folder,
        "--min_size",
        32,
        "--allow_private",
        "--num_workers",
        4,
        "--timeout",
        60,
    ]
    stage.main(stage.parse_args([str(a) for a in [*common, *flags]]))
    return folder


def rows_of(folder: Path) -> list[dict]:
    """The rows without their checksums, which are found to be right."""
    rows = [json.loads(line) for line in folder.with_name(folder.name + ".jsonl").read_text("utf-8").splitlines()]
    for row in rows:
        assert row.pop("sha256") == hashlib.sha256((folder.parent / row["file_name"]).read_bytes()).hexdigest()
    return rows


def reasons_of(folder: Path) -> dict[int, str]:
    return {row: reason.split(":")[0] for row, reason in errors_of(folder).items()}


def errors_of(folder: Path) -> dict[int, str]:
    lines = folder.with_name(folder.name + ".errors.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert all(row.keys() == {"item", "stage", "reason"} and row["stage"] == "download" for row in rows)
    assert len({row["item"] for row in rows}) == len(rows), "a row of the table failed twice in one file"
    return {row["item"]: row["reason"] for row in rows}


def content(folder: Path) -> dict[str, bytes]:
    """Every file of the output but the record, which holds times."""
    files = [
        *folder.iterdir(),
        folder.with_name(folder.name + ".jsonl"),
        folder.with_name(folder.name + ".errors.jsonl"),
    ]
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.parametrize("num_workers", [1, 8])
def test_pictures_of_every_mode_are_named_after_their_rows(web, tmp_path, num_workers):
    good = {  # body, colour and size worked out by hand: on white, upper byte of 16 bits, shortest side 40
        "/rgb.png": (picture("RGB", (200, 30, 60)), (200, 30, 60), (53, 40)),
        "/rgba.png": (picture("RGBA", (255, 0, 0, 128)), (255, 127, 127), (53, 40)),
        "/l.png": (picture("L", 90, (40, 90)), (90, 90, 90), (40, 90)),
        "/la.png": (picture("LA", (0, 0)), (255, 255, 255), (53, 40)),
        "/p.png": (palette_picture(), (10, 200, 40), (53, 40)),
        "/cmyk.jpg": (picture("CMYK", (0, 255, 255, 0), kind="JPEG"), (255, 0, 0), (53, 40)),
        "/16bit.png": (picture("I;16", 0x8040, (160, 80)), (128, 128, 128), (80, 40)),
        "/tiny.webp": (picture("RGB", (0, 0, 255), (33, 32), "WEBP"), (0, 0, 255), (33, 32)),
    }
    for path, (body, *_) in good.items():
        web.add(path, body)
    whole = picture("RGB", tuple(range(3)), (300, 300), "BMP")
    dead = {
        "/gone.jpg": (None, "HTTP 404"),
        "/page.jpg": (b"<html>not found</html>", "not an image"),
        "/empty.jpg": (b"", "not an image"),
        "/vector.svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='99' height='99'/>", "not an image"),
        "/script.eps": (picture("RGB", kind="EPS"), "not an image"),
        "/odd.ppm": (picture("RGB", kind="PPM"), "not an image"),
        "/cut.jpg": (lambda h: h.answer(200, whole[:5000], len(whole), Connection="close"), "broken connection"),
        "/torn.bmp": (whole[:5000], "not an image"),
        "/small.png": (picture(size=(100, 31)), "too small"),
        "/bomb.png": (BOMB, "too large"),
        "/long.png": (picture(size=(33 * 7, 33)), "too long"),
        "/noai.png": (lambda h: h.answer(200, picture(), X_Robots_Tag="NoAI, noimageai"), "opted out"),
        "/error.png": (lambda h: h.answer(500, b""), "HTTP 500"),
        "/loop.png": (lambda h: h.answer(302, b"", Location="/loop.png"), "too many redirects"),
        "/file.png": (lambda h: h.answer(302, b"", Location="file:///etc/hostname"), "not an http(s) address"),
    }
    for path, (page, _) in dead.items():
        web.add(path, page)
    web.add("/moved.png", lambda h: h.answer(301, b"", Location="/there/..%2f..%2fevil.png"))
    web.add("/there/..%2F..%2Fevil.png", picture(color=(1, 2, 3)))

    # Mix them, so that the numbers of the good rows have gaps, and let the first be the last to arrive.
    web.add("/rgb.png", lambda h: (time.sleep(0.2), h.answer(200, good["/rgb.png"][0], Content_Type="text/html")))
    paths = [path for pair in zip(good, list(dead), strict=False) for path in pair] + [
        *list(dead)[len(good) :],
        "/moved.png",
    ]
    table = [(web.url + path, f"caption of {path}, ü", 7) for path in paths]
    table += [
        ("ftp://127.0.0.1/a.png", "caption", 7),
        ("", "caption", 7),
        ("http://[bad/a.png", "caption", 7),
        (web.url + "/rgb.png", "  ", 7),
        (web.url + "/rgb.png", "caption", "very nice"),
        (web.url + "/rgb.png", "caption", "nan"),
        (web.url + "/rgb.png", "low", 6.49),
        (web.add("/enough.png", picture(color=(9, 9, 9))), "just enough", 6.5),
    ]
    folder = run(
        tmp_path,
        write_csv(tmp_path / "urls.csv", table),
        "--num_workers",
        num_workers,
        "--image_size",
        40,
        "--max_aspect",
        6.9,
    )

    good["/moved.png"] = (None, (1, 2, 3), (53, 40))
    expected = {row: path for row, path in enumerate(paths) if path in good}
    assert rows_of(folder) == [
        {"file_name": f"out/{row:09d}.jpg", "caption": f"caption of {path}, ü", "url": web.url + path}
        for row, path in expected.items()
    ] + [{"file_name": f"out/{len(table) - 1:09d}.jpg", "caption": "just enough", "url": web.url + "/enough.png"}]
    assert {p.name for p in folder.iterdir()} == {Path(row["file_name"]).name for row in rows_of(folder)}
    for row, path in expected.items():
        image = Image.open(folder / f"{row:09d}.jpg")
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", good[path][2]), path
        assert np.abs(np.asarray(image, int) - good[path][1]).max() <= 4, path

    kinds = reasons_of(folder)
    assert kinds == {row: dead[path][1] for row, path in enumerate(paths) if path in dead} | dict(
        enumerate(["not an http(s) address"] * 3 + ["no caption"] + ["score is not a number"] * 2, len(paths))
    )
    record = json.loads((tmp_path / "out.run.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert record["pictures"] == len(good) + 1
    assert record["reasons"]["not an http(s) address"] == 4 and record["reasons"]["below --min_aesthetic"] == 1
    assert sum(record["reasons"].values()) == len(table) - len(good) - 1


def test_quality_and_size_are_what_was_asked(web, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8))
    buffer = BytesIO()
    noise.save(buffer, "PNG")
    table = write_csv(tmp_path / "urls.csv", [(web.add("/noise.png", buffer.getvalue()), "noise")], ["url", "caption"])
    folder = run(tmp_path, table, "--image_size", 0, "--quality", 71)
    buffer = BytesIO()
    noise.save(buffer, "JPEG", quality=71)
    assert (folder / "000000000.jpg").read_bytes() == buffer.getvalue()


def test_the_downloader_says_who_it_is_and_keeps_no_cookies(web, tmp_path):
    page = web.add("/a.png", lambda h: h.answer(200, picture(), Set_Cookie="id=1; Path=/"))
    folder = run(tmp_path, write_csv(tmp_path / "t.csv", [(page, "c")] * 3, ["url", "caption"]), "--num_workers", 1)
    assert errors_of(folder) == dict.fromkeys((1, 2), "duplicate: the same picture as row 0")
    assert len(web.headers) == 3
    assert all(h["User-Agent"].startswith("align_sd ") and h["Cookie"] is None for h in web.headers)


def test_every_kind_of_table_gives_the_same(web, tmp_path):
    captions = ['a "quoted" dog, running', "tab\there", "two\nlines", "Ünïcode 犬 👩‍🎨", "plain"]
    urls = [web.add(f"/{i}.png", numbered(i)) for i in range(5)] + [web.url + "/gone.png"]
    rows = list(zip(urls, [*captions, "gone"], [7.5, 6.6, 6.5, 8.0, 2.0, 9.0], strict=True))
    names = ["URL", "TEXT", "AESTHETIC_SCORE"]
    write_csv(tmp_path / "t.csv", rows)
    write_csv(tmp_path / "t.tsv", rows, delimiter="\t")
    lines = [json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows]
    (tmp_path / "t.jsonl").write_text("".join(lines))
    parquet.write_table(pa.table(dict(zip(names, zip(*rows, strict=True), strict=True))), tmp_path / "t.parquet", 2)
    for kind in ("csv", "tsv", "jsonl"):
        (tmp_path / f"t.{kind}.gz").write_bytes(gzip.compress((tmp_path / f"t.{kind}").read_bytes()))

    seen = {}
    for kind in ("csv", "tsv", "jsonl", "parquet", "csv.gz", "tsv.gz", "jsonl.gz"):
        (tmp_path / kind).mkdir()
        seen[kind] = content(run(tmp_path / kind, tmp_path / f"t.{kind}"))
    cleaned = [caption.replace("\t", " ").replace("\n", " ") for caption in captions]
    assert [row["caption"] for row in rows_of(tmp_path / "parquet" / "out")] == cleaned[:4]
    assert seen["csv"].keys() == {f"{i:09d}.jpg" for i in range(4)} | {"out.jsonl", "out.errors.jsonl"}
    assert all(output == seen["csv"] for output in seen.values())


def test_malformed_rows_keep_their_numbers(web, tmp_path):
    url, other = web.add("/a.png", picture()), web.add("/b.png", picture(color=(0, 99, 0)))
    (tmp_path / "t.csv").write_text(
        f"\ufeffurl,caption\n{url},first\n{url}\n\n{url},a,b\n{url},{'x' * 200_000}\n{other},last\n", "utf-8"
    )
    folder = run(tmp_path, tmp_path / "t.csv")
    assert [(row["file_name"], row["caption"]) for row in rows_of(folder)] == [
        ("out/000000000.jpg", "first"),
        ("out/000000004.jpg", "last"),
    ]
    assert reasons_of(folder) == dict.fromkeys((1, 2, 3), "malformed row")

    good = json.dumps({"url": url, "caption": "c"})
    lines = [good, "[1, 2]", "{not json", "", json.dumps({"caption": "c"}), json.dumps({"url": url})]
    lines += [json.dumps({"url": other, "caption": "c"}), good[:-5]]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    folder = run(tmp_path, tmp_path / "t.jsonl", "--overwrite")
    assert [row["file_name"] for row in rows_of(folder)] == ["out/000000000.jpg", "out/000000005.jpg"]
    assert reasons_of(folder) == {
        1: "malformed row", 2: "malformed row", 3: "not an http(s) address", 4: "no caption", 6: "malformed row",
    }  # fmt: skip


@pytest.mark.parametrize(
    "columns", [("URL", "TEXT", "AESTHETIC_SCORE"), ("image_url", "Caption", "aesthetic"), ("Img-URL", "alt_text", "Aesthetic Score")]
)  # fmt: skip
def test_columns_are_guessed(web, tmp_path, columns):
    url = web.add("/a.png", picture())
    table = write_csv(
        tmp_path / "t.csv", [(1, 7, "kept", url), (2, 6, "low", url)], ["id", columns[2], columns[1], columns[0]]
    )
    assert [row["caption"] for row in rows_of(run(tmp_path, table))] == ["kept"]


def test_columns_may_be_named_and_the_filter_needs_scores(web, tmp_path, capsys):
    urls = web.add("/a.png", picture()), web.add("/b.png", picture(color=(0, 99, 0)))
    table = [(urls[0], "english", "deutsch", 7), (urls[1], "low", "tief", 3)]
    table = write_csv(tmp_path / "t.csv", table, ["where", "text", "de", "nice"])
    flags = ["--url_column", "where", "--caption_column", "de"]
    assert [row["caption"] for row in rows_of(run(tmp_path, table, *flags))] == ["deutsch", "tief"]
    assert "--min_aesthetic is not applied" in capsys.readouterr().out
    flags += ["--score_column", "nice", "--overwrite"]
    assert [row["caption"] for row in rows_of(run(tmp_path, table, *flags))] == ["deutsch"]
    assert len(rows_of(run(tmp_path, table, *flags, "--min_aesthetic", 3))) == 2


def test_duplicates_are_kept_once_whatever_arrives_first(web, tmp_path):
    late = web.add("/0.png", lambda h: (time.sleep(0.3), h.answer(200, numbered(7))))
    same = Image.open(BytesIO(numbered(7))).convert("RGB")
    buffer = BytesIO()
    same.save(buffer, "WEBP", lossless=True, icc_profile=b"other bytes, the same pixels")
    urls = [late, web.add("/1.webp", buffer.getvalue()), web.add("/2.png", numbered(8)), web.url + "/2.png"]
    table = write_csv(tmp_path / "t.csv", [(url, f"caption {i}") for i, url in enumerate(urls)], ["url", "caption"])
    folder = run(tmp_path, table)
    assert [row["caption"] for row in rows_of(folder)] == ["caption 0", "caption 2"]
    assert errors_of(folder) == {i: f"duplicate: the same picture as row {i - 1}" for i in (1, 3)}
    # A later run knows the pictures of the earlier one.
    write_csv(tmp_path / "t.csv", [], ["url", "caption"])
    before = content(folder)
    (tmp_path / "out.errors.jsonl").write_text("")
    record = json.loads((tmp_path / "out.run.json").read_text())
    table = write_csv(tmp_path / "t.csv", [(url, f"caption {i}") for i, url in enumerate(urls)], ["url", "caption"])
    assert record["settings"]["table"] == f"sha256 {hashlib.sha256(table.read_bytes()).hexdigest()}"
    run(tmp_path, table)
    assert content(folder) == before


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("Tom &amp; Jerry", "Tom & Jerry"), ("a &amp;amp;quot;b&amp;amp;quot; c", 'a "b" c'), ("&#8217;tis &eacute;t&eacute;", "’tis été"),
        ("a\x00b\x1f\x7fc\x85d\ufeff", "a b c d"), ("  two\r\n\n lines\u3000and\xa0more ", "two lines and more"),
        ("R&D 3 &lt; 4 &unknown;", "R&D 3 < 4 &unknown;"), ("&nbsp;&#0;\t", "�"), ("क्‍ष 👩‍🎨", "क्‍ष 👩‍🎨"), ("half \ud83d emoji", "half emoji"),
    ],
)  # fmt: skip
def test_captions_are_cleaned(raw, cleaned):
    assert clean(raw) == cleaned.replace("�", "")


def test_what_the_table_says_saves_asking(web, tmp_path):
    names = ["URL", "TEXT", "AESTHETIC_SCORE", "punsafe", "pwatermark", "WIDTH", "HEIGHT"]
    good = (7.0, 0.5, 0.5, 32, 32)
    rows = [good, (6.4, 0.9, 0.9, 1, 1), (7.0, 0.51, 0.1, 99, 99), (7.0, 0.1, 0.51, 99, 99), (7.0, 0.1, 0.1, 31, 99)]
    rows += [(7.0, 0.1, 0.1, 99, 31), (7.0, None, None, None, None), (None, 0.1, 0.1, 99, 99), (7.0, 0.1, 0.1, 99, 99)]
    rows = [(web.add(f"/{i}.png", numbered(i)), f"caption {i}", *row) for i, row in enumerate(rows)]
    counts = {"below --min_aesthetic": 1, "above --max_punsafe": 1, "above --max_pwatermark": 1}
    counts |= {"below --min_size in the table": 2, "score is not a number": 1}
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet", 4)
    parquet.write_table(
        pa.table({name: list(map(str, column)) for name, column in columns.items()}), tmp_path / "s.parquet"
    )
    for table in (tmp_path / "t.parquet", tmp_path / "s.parquet", write_csv(tmp_path / "t.csv", rows, names)):
        web.asked.clear()
        folder = run(tmp_path, table, "--overwrite")
        assert [row["caption"] for row in rows_of(folder)] == ["caption 0", "caption 6", "caption 8"], table
        assert sorted(web.asked) == ["/0.png", "/6.png", "/8.png"]
        assert json.loads((tmp_path / "out.run.json").read_text())["reasons"] == counts
    flags = ["--max_punsafe", 0.6, "--max_pwatermark", 1, "--min_aesthetic", 0, "--overwrite"]
    assert [row["caption"][-1] for row in rows_of(run(tmp_path, tmp_path / "t.parquet", *flags))] == list("02368")


def test_the_filtered_table_is_written_for_img2dataset(web, tmp_path, capsys):
    rows = [(f"{web.url}/{i}.png ", f"caption &amp; {i}", 6 + i % 2) for i in range(25_000)]
    rows[7] = ("ftp://a/b.png", "no address", 7)
    rows[9] = (rows[9][0], " ", 7)
    table = write_csv(tmp_path / "t.csv", rows)
    run(tmp_path, table, "--write_urls", tmp_path / "urls.parquet")
    written = parquet.read_table(tmp_path / "urls.parquet").to_pydict()
    assert written["row"] == [i for i in range(1, 25_000, 2) if i not in (7, 9)]
    assert written["url"] == [f"{web.url}/{i}.png" for i in written["row"]]
    assert written["caption"] == [f"caption & {i}" for i in written["row"]]
    assert web.asked == [] and not (tmp_path / "out").exists()
    errors = [json.loads(line) for line in (tmp_path / "urls.errors.jsonl").read_text().splitlines()]
    assert [error["item"] for error in errors] == [7, 9]
    said = capsys.readouterr().out
    assert "12,498 rows; left out: 12,502" in said and "12,500  below --min_aesthetic" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.csv", "urls.errors.jsonl", "urls.parquet"]


def test_a_machine_that_is_offline_says_so(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "no network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(stage, "OFFLINE", 20)
    urls = ["http://0.invalid/a.png"] * 30 + [f"http://{i}.invalid/a.png" for i in range(50)]
    table = write_csv(tmp_path / "t.csv", [(url, "c") for url in urls], ["url", "caption"])
    with pytest.raises(UserError, match="20 hosts in a row did not answer: is this machine online"):
        run(tmp_path, table)
    assert reasons_of(tmp_path / "out") == dict.fromkeys(range(50), "dead host")


# ---------------------------------------------------------------------------------------------------------------------
# What img2dataset wrote: 1.47's files, made by hand here


def jpeg(i: int, size=(64, 48)) -> bytes:
    buffer = BytesIO()
    Image.open(BytesIO(numbered(i))).resize(size, Image.Resampling.NEAREST).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_shard(folder: Path, number: int, rows, tar: bool, finished=True, **columns):
    """`rows` are (body or None, caption); the keys count up from 10,000 times the shard's number, as img2dataset's do."""
    folder.mkdir(exist_ok=True)
    name, files = f"{number:05d}", {}
    table = {name: [] for name in ("url", "caption", "key", "status", "error_message")}
    for i, (body, caption) in enumerate(rows):
        key = f"{number * 10_000 + i:09d}"
        failed = None if body else "HTTP Error 404: Not Found"
        values = (f"http://web.example/{key}", caption, key, "failed_to_download" if failed else "success", failed)
        for column, value in zip(table.values(), values, strict=True):
            column.append(value)
        if body:
            files |= {
                f"{key}.jpg": body,
                f"{key}.txt": caption.encode(),
                f"{key}.json": json.dumps({"key": key}).encode(),
            }
    parquet.write_table(pa.table(table | columns), folder / f"{name}.parquet")
    if tar:
        with tarfile.open(folder / f"{name}.tar", "w") as archive:
            for file, body in files.items():
                member = tarfile.TarInfo(file)
                member.size = len(body)
                archive.addfile(member, BytesIO(body))
    else:
        (folder / name).mkdir()
        for file, body in files.items():
            (folder / name / file).write_bytes(body)
    if finished:
        (folder / f"{name}_stats.json").write_text("{}")


def take_over(tmp_path: Path, source: Path, *flags) -> Path:
    flags = ["--from_img2dataset", source, "--output_folder", tmp_path / "out", "--min_size", 32, *flags]
    stage.main(stage.parse_args([str(flag) for flag in flags]))
    return tmp_path / "out"


@pytest.mark.parametrize("tar", [False, True])
def test_img2dataset_shards_become_rows(tmp_path, tar, capsys):
    source = tmp_path / "shards"
    first = [(jpeg(1), "one &amp;\none"), (None, "gone"), (jpeg(1), "twice"), (b"<svg/>", "no picture"), (jpeg(2), "")]
    write_shard(source, 0, [*first, (jpeg(3, (100, 30)), "small")], tar)
    write_shard(source, 1, [(jpeg(4), "four"), (jpeg(5), "five")], tar)
    write_shard(source, 2, [(jpeg(6), "six")], tar, finished=False)
    (source / "00003.parquet").write_bytes(b"PAR1 no, it is not")
    (source / "00003_stats.json").write_text("{}")
    write_shard(source, 4, [(jpeg(7), "seven")], tar, row=[33])  # what --save_additional_columns '["row"]' adds
    folder = take_over(tmp_path, source)
    expected = {0: (1, "one & one"), 10_000: (4, "four"), 10_001: (5, "five"), 33: (7, "seven")}
    assert rows_of(folder) == [
        {"file_name": f"out/{row:09d}.jpg", "caption": caption, "url": f"http://web.example/{key:09d}"}
        for row, (_, caption), key in zip(expected, expected.values(), (0, 10_000, 10_001, 40_000), strict=True)
    ]
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        f"{row:09d}.jpg": jpeg(i) for row, (i, _) in expected.items()
    }
    assert (folder / "000010000.jpg").stat().st_nlink == (1 if tar else 2)
    assert errors_of(folder) == {
        1: "img2dataset, failed_to_download: HTTP Error 404: Not Found", 2: "duplicate: the same picture as row 0",
        3: "not an image", 4: "no caption", 5: "too small: 100 x 30",
    }  # fmt: skip
    said = capsys.readouterr().err
    assert "00002.parquet: left out, its shard is not finished" in said and "00003.parquet: left out" in said

    # The shard that was not finished is by now; and again changes nothing.
    (source / "00002_stats.json").write_text("{}")
    for _ in range(2):
        assert len(rows_of(take_over(tmp_path, source))) == 5
        assert len(errors_of(folder)) == 5


def test_img2dataset_shards_that_were_cut_or_are_elsewhere(tmp_path):
    source = tmp_path / "shards"
    write_shard(source, 0, [(jpeg(i), f"caption {i}") for i in range(6)], tar=True)
    whole = (source / "00000.tar").read_bytes()
    (source / "00000.tar").write_bytes(whole[: whole.index(b"000000004.jpg") + 600])
    write_shard(source, 1, [(jpeg(9), "nine"), (jpeg(8), "eight")], tar=False)
    (source / "00001" / "000010000.jpg").unlink()
    folder = take_over(tmp_path, source)
    assert [row["caption"] for row in rows_of(folder)] == [*(f"caption {i}" for i in range(4)), "eight"]
    assert {4, 5, 10_000} == set(errors_of(folder))
    assert errors_of(folder)[10_000].startswith("missing: 000010000 in ")
    (source / "00000_stats.json").unlink()
    (source / "00001_stats.json").unlink()
    with pytest.raises(UserError, match="no finished shard"):
        take_over(tmp_path, source, "--overwrite")
    for folder, said in ((tmp_path / "no", "no such folder"), (source / "00001", "no shard of img2dataset there")):
        with pytest.raises(UserError, match=said):
            take_over(tmp_path / "other", folder)
    assert not (tmp_path / "other").exists()


def test_num_images_is_exact_and_may_grow(web, tmp_path):
    urls = [web.url + f"/{i}.png" if i % 3 == 0 else web.add(f"/{i}.png", numbered(i)) for i in range(60)]
    table = write_csv(tmp_path / "t.csv", [(url, "c") for url in urls], ["url", "caption"])
    names = [f"out/{i:09d}.jpg" for i in range(60) if i % 3]
    for wanted in (7, 12):
        folder = run(tmp_path, table, "--num_images", wanted, "--num_workers", 2)
        assert [row["file_name"] for row in rows_of(folder)] == names[:wanted]
        assert sorted(p.name for p in folder.iterdir()) == [Path(n).name for n in names[:wanted]]
    # The same again asks nobody; fewer than there are takes nothing away.
    web.asked.clear()
    run(tmp_path, table, "--num_images", 12)
    assert len(rows_of(run(tmp_path, table, "--num_images", 5))) == 12
    assert web.asked == []
    # More than the table has is all that it has, and only what is missing is asked for.
    assert [row["file_name"] for row in rows_of(run(tmp_path, table))] == names
    assert not {f"/{i}.png" for i in range(18)} & set(web.asked)


def test_a_slow_row_holds_back_only_so_many(web, tmp_path):
    urls = [web.add(f"/{i}.png", numbered(i)) for i in range(200)]
    table = write_csv(tmp_path / "t.csv", [(url, "c") for url in urls], ["url", "caption"])

    def slow(handler):
        for _ in range(50):  # long enough to ask for the rest of the table, if that were what happens
            time.sleep(0.01 if len(web.asked) < 200 else 0)
        assert len(web.asked) <= 2 * 5 + 16
        handler.answer(200, numbered(0))

    web.add("/0.png", slow)
    folder = run(tmp_path, table, "--num_images", 5, "--num_workers", 2)
    assert [row["file_name"] for row in rows_of(folder)] == [f"out/{i:09d}.jpg" for i in range(5)]


@pytest.mark.parametrize("cut", [1, 20, 2000])
def test_a_torn_last_line_is_made_good(web, tmp_path, cut):
    urls = [web.add(f"/{i}.png", numbered(i)) for i in range(12)] + [web.url + "/gone.png"] * 3
    table = write_csv(tmp_path / "t.csv", [(url, f"caption {i}") for i, url in enumerate(urls)], ["url", "caption"])
    folder = run(tmp_path, table)
    whole = content(folder)
    assert len(whole) == 12 + 2
    for name in ("out.jsonl", "out.errors.jsonl"):
        lines = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(lines[: max(0, len(lines) - cut)])
    (folder / "000000003.jpg").write_bytes(b"")  # without a row after the longest cut, and then fetched again
    (folder / ".waiting").mkdir()
    (folder / ".waiting" / ".000000004.jpg.host.1.tmp").write_bytes(b"half")
    if cut < 2000:
        (folder / "000000003.jpg").write_bytes(whole["000000003.jpg"])
    run(tmp_path, table)
    assert content(folder) == whole


def test_killed_at_any_moment_it_goes_on(web, tmp_path):
    def page(i):
        def answer(handler):
            if i >= 190:  # the end of the table is out of reach until the killing is over
                web.gate.wait(600)
            time.sleep(0.05 if i % 11 == 3 else 0.01)  # they do not arrive in order
            handler.answer(200, numbered(i))

        return answer

    urls = [web.url + f"/{i}.png" if i % 5 == 0 else web.add(f"/{i}.png", page(i)) for i in range(200)]
    table = write_csv(tmp_path / "t.csv", [(url, f"caption {i}") for i, url in enumerate(urls)], ["url", "caption"])
    folder = tmp_path / "killed" / "out"
    command = [sys.executable, SCRIPT, "--urls", table, "--output_folder", folder, "--min_size", 32]
    command += ["--allow_private", "--num_workers", 4, "--timeout", 600]
    moments, reported, kept = random.Random(), [], set()
    for kill in range(KILLS):
        process = subprocess.Popen([str(a) for a in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while kill and process.poll() is None and not folder.with_name("out.run.json").exists():
            time.sleep(0.002)
        time.sleep(moments.uniform(0.3, 1.2))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
        # What was reported is whole and stays reported, in order.
        lines = folder.with_name("out.jsonl")
        rows = (
            [json.loads(line) for line in lines.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            if lines.exists()
            else []
        )
        names = [row["file_name"] for row in rows]
        assert names == sorted(set(names)) and rows[: len(reported)] == reported
        for row in rows[len(reported) :]:
            assert hashlib.sha256((folder.parent / row["file_name"]).read_bytes()).hexdigest() == row["sha256"]
        # What was fetched and has not had its turn is not fetched again.
        assert not kept & set(web.asked)
        web.asked.clear()
        reported, kept = rows, {f"/{int(path.stem)}.png" for path in folder.glob(".waiting/0*.jpg")}
    web.gate.set()
    run(tmp_path / "killed", table)
    assert not kept & set(web.asked)
    (tmp_path / "whole").mkdir()
    assert content(folder) == content(run(tmp_path / "whole", table))
    assert len(rows_of(folder)) == 160 and len(errors_of(folder)) == 40


def test_failures_are_tried_again_only_on_request(web, tmp_path):
    urls = [web.add(f"/{i}.png", numbered(i)) for i in range(6)] + [web.url + "/gone.png"]
    table = write_csv(tmp_path / "t.csv", [(url, f"caption {i}") for i, url in enumerate(urls)], ["url", "caption"])
    page = web.pages.pop("/2.png")
    folder = run(tmp_path, table)
    assert errors_of(folder) == {2: "HTTP 404", 6: "HTTP 404"}

    web.pages["/2.png"] = page
    web.asked.clear()
    run(tmp_path, table)
    assert web.asked == [] and errors_of(folder) == {2: "HTTP 404", 6: "HTTP 404"}

    run(tmp_path, table, "--retry")
    assert sorted(web.asked) == ["/2.png", "/gone.png"]
    assert errors_of(folder) == {6: "HTTP 404"}
    names = [row["file_name"] for row in rows_of(folder)]
    assert sorted(names) == [f"out/{i:09d}.jpg" for i in range(6)]
    assert rows_of(folder)[names.index("out/000000002.jpg")]["caption"] == "caption 2"

    # What a --retry that was killed leaves behind: failures of rows that failed again, or that are done by now.
    with open(tmp_path / "out.errors.jsonl", "a") as file:
        file.writelines(json.dumps({"item": i, "stage": "download", "reason": "HTTP 503"}) + "\n" for i in (2, 6))
    run(tmp_path, table)
    assert json.loads((tmp_path / "out.run.json").read_text())["reasons"] == {"HTTP 503": 1}
    assert errors_of(run(tmp_path, table, "--retry")) == {6: "HTTP 404"}


def test_other_settings_are_refused_until_overwritten(web, tmp_path):
    urls = [web.add(f"/{i}.png", numbered(i)) for i in range(4)]
    table = write_csv(tmp_path / "t.csv", [(url, "c", 7 + i) for i, url in enumerate(urls)])
    folder = run(tmp_path, table)
    before = content(folder)
    other = write_csv(tmp_path / "other.csv", [(urls[0], "c", 7)])
    for flags, named in [
        (["--quality", 90], "quality was 95, now 90"),
        (["--min_size", 33], "min_size was 32, now 33"),
        (["--image_size", 48], "image_size"),
        (["--min_aesthetic", 8], "limits was"),
        (["--max_aspect", 2], "max_aspect"),
        (["--caption_column", "URL"], "caption_column"),
        (["--urls", other], "table"),
    ]:
        with pytest.raises(UserError, match=named):
            run(tmp_path, table, *flags)
        assert content(folder) == before
    run(tmp_path, table, "--num_images", 9, "--num_workers", 1, "--timeout", 3, "--max_bytes", 99999)
    assert content(folder) == before

    (folder / "mine.jpg").write_bytes(b"not from here")
    run(tmp_path, table, "--min_aesthetic", 9, "--overwrite")
    assert {p.name for p in folder.iterdir()} == {"000000002.jpg", "000000003.jpg", "mine.jpg"}

    # Rows of unknown origin, such as the original's, must not be taken for rows of this table.
    (tmp_path / "out.run.json").unlink()
    with pytest.raises(UserError, match=r"no out\.run\.json"):
        run(tmp_path, table)
    # Nor are pictures without rows swept away.
    (tmp_path / "out.jsonl").unlink()
    with pytest.raises(UserError, match=r"no out\.run\.json"):
        run(tmp_path, table)
    assert (folder / "000000002.jpg").exists()


def test_mistakes_are_said_before_anything_is_written(tmp_path):
    table = write_csv(tmp_path / "t.csv", [("http://127.0.0.1/a.png", "c")], ["address", "words"])
    (tmp_path / "t.txt").write_text("http://127.0.0.1/a.png")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no, it is not")
    (tmp_path / "bad.csv.gz").write_bytes(b"no gzip")
    there = sorted(p.name for p in tmp_path.iterdir())
    for flags, said in [
        (["--urls", tmp_path / "no.csv"], r"no\.csv: no such file"),
        (["--urls", tmp_path / "t.txt"], r"t\.txt: a table should end in"),
        (["--urls", tmp_path / "empty.jsonl"], r"empty\.jsonl: .*\(it has none\)"),
        (["--urls", tmp_path / "bad.parquet"], r"bad\.parquet: .*Parquet"),
        (["--urls", tmp_path / "bad.csv.gz"], r"bad\.csv\.gz: Not a gzipped file"),
        ([], r"t\.csv: .*--url_column \(it has address, words\)"),
        (["--url_column", "address"], r"--caption_column \(it has address, words\)"),
        (["--url_column", "link"], r"no column 'link' for --url_column \(it has address, words\)"),
        (["--url_column", "address", "--caption_column", "words", "--score_column", "x"], "no column 'x'"),
        (["--num_workers", 0], "--num_workers 0: should be at least 1"),
        (["--num_images", 0], "--num_images 0"),
        (["--max_aspect", 0.5], "--max_aspect 0.5: should be at least 1"),
        (["--max_aspect", "nan"], "--max_aspect nan"),
        (["--max_per_host", 0], "--max_per_host 0"),
        (["--write_urls", "t.csv"], "--write_urls t.csv: should end in .parquet"),
        (["--timeout", 0], "--timeout 0"),
        (["--timeout", "nan"], "--timeout nan"),
        (["--quality", 101], "--quality 101"),
        (["--output_folder", "."], "--output_folder"),
    ]:
        with pytest.raises(UserError, match=said):
            run(tmp_path, table, *flags)
        assert sorted(p.name for p in tmp_path.iterdir()) == there


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--urls", "missing.parquet"], r"error: missing\.parquet: no such file"),
        ([], r"error: --dataset laion/aesthetics_v2_4\.75: .*accept its terms .*log in .*or pass --urls FILE"),
        (["--urls", "t.csv", "--output_folder", "t.csv"], r"error: t\.csv: File exists"),
    ],
)
def test_a_mistake_ends_with_one_line_and_exit_code_2(tmp_path, flags, said):
    write_csv(tmp_path / "t.csv", [], ["url", "caption"])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    result = subprocess.run(
        [sys.executable, SCRIPT, *flags], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert re.fullmatch(said + "\n", result.stderr), result.stderr
    assert not (tmp_path / "regularization_images").exists()


def test_a_data_set_is_streamed_through_the_datasets_library(web, tmp_path):
    # A folder of Parquet files stands for one on the hub: the library reads both by the same code.
    (tmp_path / "table").mkdir()
    urls = [web.add(f"/{i}.png", numbered(i)) if i % 800 == 0 else web.url for i in range(2500)]
    columns = {"URL": urls, "TEXT": [f"caption {i}" for i in range(2500)], "hash": list(range(2500))}
    columns["AESTHETIC_SCORE"] = [6.5 if i % 800 == 0 else 6.4 for i in range(2500)]
    parquet.write_table(pa.table(columns), tmp_path / "table" / "train.parquet")
    flags = ["--dataset", tmp_path / "table", "--output_folder", tmp_path / "out", "--min_size", 0, "--allow_private"]
    stage.main(stage.parse_args([str(a) for a in flags]))
    assert [(row["file_name"], row["caption"], row["url"]) for row in rows_of(tmp_path / "out")] == [
        (f"out/{i:09d}.jpg", f"caption {i}", urls[i]) for i in (0, 800, 1600, 2400)
    ]
    with pytest.raises(UserError, match=r"Bad split: test\."):
        stage.main(stage.parse_args([str(a) for a in flags] + ["--split", "test"]))
