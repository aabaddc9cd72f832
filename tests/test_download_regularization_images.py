"""The downloader against a real server on 127.0.0.1 that does what the open web does."""

import csv
import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

import download_regularization_images as stage
from utils.errors import UserError

SCRIPT = Path(stage.__file__)


def picture(mode="RGB", color=(200, 30, 60), size=(64, 48), kind="PNG") -> bytes:
    buffer = BytesIO()
    Image.new(mode, size, color).save(buffer, kind)
    return buffer.getvalue()


def palette_picture() -> bytes:
    image = Image.new("P", (64, 48), 1)
    image.putpalette([0, 0, 0, 10, 200, 40])
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


class Web:
    """Pages by path: the body, or a function of the request's handler. `asked` lists the requests in order."""

    def __init__(self):
        self.pages, self.asked, self.headers = {}, [], []
        self.gate = threading.Event()  # what a page may wait for; opened when the test ends
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                web.asked.append(self.path)
                web.headers.append(self.headers)
                page = web.pages.get(self.path)
                if callable(page):
                    page(self)
                else:
                    self.answer(404 if page is None else 200, page or b"gone")

            def answer(self, status, body, length=None, **headers):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_):
                pass  # a client that hangs up is what the tests are about

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def add(self, path, page) -> str:
        self.pages[path] = page
        return self.url + path

    def close(self):
        self.gate.set()
        self.server.shutdown()
        self.server.server_close()


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
    return [json.loads(line) for line in folder.with_name(folder.name + ".jsonl").read_text("utf-8").splitlines()]


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
        "/page.jpg": (b"<html>not found</html>", "not a picture"),
        "/empty.jpg": (b"", "not a picture"),
        "/vector.svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='99' height='99'/>", "not a picture"),
        "/script.eps": (picture("RGB", kind="EPS"), "not a picture"),
        "/odd.ppm": (picture("RGB", kind="PPM"), "not a picture"),
        "/cut.jpg": (lambda h: h.answer(200, whole[:5000], len(whole), Connection="close"), "broken connection"),
        "/torn.bmp": (whole[:5000], "not a picture"),
        "/small.png": (picture(size=(100, 31)), "too small"),
        "/noai.png": (lambda h: h.answer(200, picture(), X_Robots_Tag="NoAI, noimageai"), "opted out"),
        "/error.png": (lambda h: h.answer(500, b""), "HTTP 500"),
        "/loop.png": (lambda h: h.answer(302, b"", Location="/loop.png"), "too many redirects"),
        "/file.png": (lambda h: h.answer(302, b"", Location="file:///etc/hostname"), "not an http(s) address"),
    }
    for path, (page, _) in dead.items():
        web.add(path, page)
    web.add("/moved.png", lambda h: h.answer(301, b"", Location="/rgb.png"))

    # Mix them, so that the numbers of the good rows have gaps, and let the first be the last to arrive.
    web.add("/rgb.png", lambda h: (time.sleep(0.2), h.answer(200, good["/rgb.png"][0])))
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
        (web.url + "/rgb.png", "just enough", 6.5),
    ]
    folder = run(tmp_path, write_csv(tmp_path / "urls.csv", table), "--num_workers", num_workers, "--image_size", 40)

    good["/moved.png"] = good["/rgb.png"]
    expected = {row: path for row, path in enumerate(paths) if path in good}
    assert rows_of(folder) == [
        {"file_name": f"out/{row:09d}.jpg", "caption": f"caption of {path}, ü", "url": web.url + path}
        for row, path in expected.items()
    ] + [{"file_name": f"out/{len(table) - 1:09d}.jpg", "caption": "just enough", "url": web.url + "/rgb.png"}]
    assert {p.name for p in folder.iterdir()} == {Path(row["file_name"]).name for row in rows_of(folder)}
    for row, path in expected.items():
        image = Image.open(folder / f"{row:09d}.jpg")
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", good[path][2]), path
        assert np.abs(np.asarray(image, int) - good[path][1]).max() <= 4, path

    kinds = {row: reason.split(":")[0] for row, reason in errors_of(folder).items()}
    assert kinds == {row: dead[path][1] for row, path in enumerate(paths) if path in dead} | dict(
        enumerate(["not an http(s) address"] * 3 + ["no caption"] + ["score is not a number"] * 2, len(paths))
    )
    record = json.loads((tmp_path / "out.run.json").read_text())
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


def test_slow_and_dripping_servers_are_cut_off(web, tmp_path):
    def silent(handler):
        web.gate.wait(10)

    def drip(head):
        def page(handler):
            handler.wfile.write(head)
            for _ in range(200):  # no silence is as long as the timeout
                web.gate.wait(0.05)
                handler.wfile.write(b"a")
            handler.close_connection = True

        return page

    urls = [
        web.add("/silent.png", silent),
        web.add("/header.png", drip(b"HTTP/1.1 200 OK\r\nX-Slow: ")),
        web.add("/body.png", drip(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n")),
        web.add("/endless.png", drip(b"HTTP/1.1 200 OK\r\n\r\n")),
    ]
    table = write_csv(tmp_path / "urls.csv", [(url, "slow") for url in urls], ["url", "caption"])
    folder = run(tmp_path, table, "--timeout", 1)
    assert errors_of(folder) == dict.fromkeys(range(4), "timeout")
    assert rows_of(folder) == [] and list(folder.iterdir()) == []

    web.pages = dict.fromkeys(web.pages, picture())
    assert errors_of(run(tmp_path, table, "--timeout", 60, "--retry")) == {}
    assert len(rows_of(folder)) == 4


def test_bodies_are_bounded(web, tmp_path):
    def endless(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while not web.gate.is_set():
            handler.wfile.write(b"a" * 65536)

    fits = picture()
    urls = [web.add("/fits.png", fits), web.add("/longer.png", fits + b"\0"), web.add("/endless.png", endless)]
    table = write_csv(tmp_path / "urls.csv", [(url, "c") for url in urls], ["url", "caption"])
    folder = run(tmp_path, table, "--max_bytes", len(fits))
    assert [row["file_name"] for row in rows_of(folder)] == ["out/000000000.jpg"]
    assert {row: reason.split(":")[0] for row, reason in errors_of(folder).items()} == {1: "too large", 2: "too large"}


@pytest.mark.parametrize(
    ("header", "out"),
    [
        ("noai", True), ("NOIMAGEAI", True), ("all, noindex", True), ("noimageindex", True), ("none", True),
        ("align_sd: noai", True), ("*: noindex", True), ("otherbot: noindex", False), ("nofollow, noarchive", False),
        ("unavailable_after: 25 Jun 2030 15:00:00 PST", False), ("otherbot: nofollow, noai", True), ("", False),
    ],
)  # fmt: skip
def test_opting_out(header, out):
    assert stage.opted_out({"X-Robots-Tag": header}) is out


def test_the_downloader_says_who_it_is_and_keeps_no_cookies(web, tmp_path):
    page = web.add("/a.png", lambda h: h.answer(200, picture(), Set_Cookie="id=1; Path=/"))
    run(tmp_path, write_csv(tmp_path / "urls.csv", [(page, "c")] * 3, ["url", "caption"]), "--num_workers", 1)
    assert len(web.headers) == 3
    assert all(h["User-Agent"].startswith("align_sd ") and h["Cookie"] is None for h in web.headers)


def test_private_addresses_are_refused(web, tmp_path, capsys, monkeypatch):
    port = web.server.server_port
    resolve = socket.getaddrinfo

    def resolver(host, *args, **kwargs):
        if host != "innocent.example":
            return resolve(host, *args, **kwargs)
        return [answer for ip in ("8.8.8.8", "127.0.0.1") for answer in resolve(ip, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    urls = [
        web.add("/a.png", picture()),
        f"http://localhost:{port}/a.png",
        "http://10.0.0.1/a.png",
        "http://[::1]/a.png",
    ]
    urls += ["http://169.254.169.254/latest/meta-data", "http://0.0.0.0/a.png", "http://[::ffff:127.0.0.1]/a.png"]
    urls += [f"http://innocent.example:{port}/a.png"]
    table = write_csv(tmp_path / "urls.csv", [(url, "c") for url in urls], ["url", "caption"])
    stage.main(stage.parse_args(["--urls", str(table), "--output_folder", str(tmp_path / "out"), "--min_size", "0"]))
    assert {row: reason.split(":")[0] for row, reason in errors_of(tmp_path / "out").items()} == dict.fromkeys(
        range(len(urls)), "refused address"
    )
    assert web.asked == []
    assert re.search(rf"{len(urls)}  refused address", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("127.0.0.1", False), ("10.1.2.3", False), ("172.16.0.1", False),
        ("192.168.1.1", False), ("169.254.169.254", False), ("100.64.0.1", False), ("0.0.0.0", False), ("::1", False),
        ("224.0.0.1", False), ("fe80::1%2", False), ("::ffff:8.8.8.8", True), ("::ffff:224.0.0.1", False), ("fd00::1", False), ("::ffff:10.0.0.1", False), ("::", False),
    ],
)  # fmt: skip
def test_which_addresses_are_public(address, public):
    assert stage.is_public(address) is public


def test_every_kind_of_table_gives_the_same(web, tmp_path):
    captions = ['a "quoted" dog, running', "tab\there", "two\nlines", "Ünïcode 犬 🐕", "plain"]
    urls = [web.add(f"/{i}.png", picture(color=(i * 40, 100, 100))) for i in range(5)] + [web.url + "/gone.png"]
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
    assert [row["caption"] for row in rows_of(tmp_path / "parquet" / "out")] == captions[:4]
    assert seen["csv"].keys() == {f"{i:09d}.jpg" for i in range(4)} | {"out.jsonl", "out.errors.jsonl"}
    assert all(output == seen["csv"] for output in seen.values())


def test_malformed_rows_keep_their_numbers(web, tmp_path):
    url = web.add("/a.png", picture())
    (tmp_path / "t.csv").write_text(
        f"\ufeffurl,caption\n{url},first\n{url}\n\n{url},a,b\n{url},{'x' * 200_000}\n{url},last\n", "utf-8"
    )
    folder = run(tmp_path, tmp_path / "t.csv")
    assert [(row["file_name"], row["caption"]) for row in rows_of(folder)] == [
        ("out/000000000.jpg", "first"),
        ("out/000000004.jpg", "last"),
    ]
    assert {row: reason.split(":")[0] for row, reason in errors_of(folder).items()} == dict.fromkeys(
        (1, 2, 3), "malformed row"
    )

    good = json.dumps({"url": url, "caption": "c"})
    lines = [good, "[1, 2]", "{not json", "", json.dumps({"caption": "c"}), json.dumps({"url": url}), good, good[:-5]]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    folder = run(tmp_path, tmp_path / "t.jsonl", "--overwrite")
    assert [row["file_name"] for row in rows_of(folder)] == ["out/000000000.jpg", "out/000000005.jpg"]
    assert {row: reason.split(":")[0] for row, reason in errors_of(folder).items()} == {
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
    url = web.add("/a.png", picture())
    table = write_csv(
        tmp_path / "t.csv", [(url, "english", "deutsch", 7), (url, "low", "tief", 3)], ["where", "text", "de", "nice"]
    )
    flags = ["--url_column", "where", "--caption_column", "de"]
    assert [row["caption"] for row in rows_of(run(tmp_path, table, *flags))] == ["deutsch", "tief"]
    assert "--min_aesthetic is not applied" in capsys.readouterr().out
    flags += ["--score_column", "nice", "--overwrite"]
    assert [row["caption"] for row in rows_of(run(tmp_path, table, *flags))] == ["deutsch"]
    assert len(rows_of(run(tmp_path, table, *flags, "--min_aesthetic", 3))) == 2


def test_num_images_is_exact_and_may_grow(web, tmp_path):
    urls = [web.url + f"/{i}.png" if i % 3 == 0 else web.add(f"/{i}.png", picture()) for i in range(60)]
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
    urls = [web.add(f"/{i}.png", picture()) for i in range(200)]
    table = write_csv(tmp_path / "t.csv", [(url, "c") for url in urls], ["url", "caption"])

    def slow(handler):
        for _ in range(50):  # long enough to ask for the rest of the table, if that were what happens
            time.sleep(0.01 if len(web.asked) < 200 else 0)
        assert len(web.asked) <= 16 * 2 + 1
        handler.answer(200, picture())

    web.add("/0.png", slow)
    folder = run(tmp_path, table, "--num_images", 5, "--num_workers", 2)
    assert [row["file_name"] for row in rows_of(folder)] == [f"out/{i:09d}.jpg" for i in range(5)]


@pytest.mark.parametrize("cut", [1, 20, 1000])
def test_a_torn_last_line_is_made_good(web, tmp_path, cut):
    urls = [web.add(f"/{i}.png", picture(color=(i * 9, 0, 0))) for i in range(12)] + [web.url + "/gone.png"] * 3
    table = write_csv(tmp_path / "t.csv", [(url, f"caption {i}") for i, url in enumerate(urls)], ["url", "caption"])
    folder = run(tmp_path, table)
    whole = content(folder)
    assert len(whole) == 12 + 2
    for name in ("out.jsonl", "out.errors.jsonl"):
        lines = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(lines[: max(0, len(lines) - cut)])
    (folder / "000000003.jpg").write_bytes(b"")  # without a row after the longest cut, and then fetched again
    (folder / ".000000004.jpg.host.1.tmp").write_bytes(b"half")
    if cut < 1000:
        (folder / "000000003.jpg").write_bytes(whole["000000003.jpg"])
    run(tmp_path, table)
    assert content(folder) == whole


def test_killed_at_any_moment_it_goes_on(web, tmp_path):
    def page(i):
        def answer(handler):
            if i >= 70:  # the end of the table is out of reach until the killing is over
                web.gate.wait(600)
            time.sleep(0.005)
            handler.answer(200, picture(color=(i, 255 - i, 0)))

        return answer

    urls = [web.url + f"/{i}.png" if i % 5 == 0 else web.add(f"/{i}.png", page(i)) for i in range(90)]
    table = write_csv(tmp_path / "t.csv", [(url, f"caption {i}") for i, url in enumerate(urls)], ["url", "caption"])
    folder = tmp_path / "killed" / "out"
    command = [sys.executable, SCRIPT, "--urls", table, "--output_folder", folder, "--min_size", 32]
    command += ["--allow_private", "--num_workers", 4, "--timeout", 600]
    lines = folder.with_name("out.jsonl")
    for rows in (1, 14, 37):
        process = subprocess.Popen([str(a) for a in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (lines.exists() and lines.read_bytes().count(b"\n") >= rows):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
        # What was reported is whole.
        for line in lines.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                Image.open(folder.parent / json.loads(line)["file_name"]).load()
    web.gate.set()
    run(tmp_path / "killed", table)
    (tmp_path / "whole").mkdir()
    assert content(folder) == content(run(tmp_path / "whole", table))
    assert len(rows_of(folder)) == 72 and len(errors_of(folder)) == 18


def test_failures_are_tried_again_only_on_request(web, tmp_path):
    urls = [web.add(f"/{i}.png", picture(color=(i * 20, 0, 0))) for i in range(6)] + [web.url + "/gone.png"]
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
    urls = [web.add(f"/{i}.png", picture()) for i in range(4)]
    table = write_csv(tmp_path / "t.csv", [(url, "c", 7 + i) for i, url in enumerate(urls)])
    folder = run(tmp_path, table)
    before = content(folder)
    other = write_csv(tmp_path / "other.csv", [(urls[0], "c", 7)])
    for flags, named in [
        (["--quality", 90], "quality was 95, now 90"),
        (["--min_size", 33], "min_size was 32, now 33"),
        (["--image_size", 48], "image_size"),
        (["--min_aesthetic", 8], "min_aesthetic"),
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
    with pytest.raises(UserError, match=r"run\.json is missing"):
        run(tmp_path, table)


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
    urls = [web.add(f"/{i}.png", picture()) for i in range(2500)]
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
