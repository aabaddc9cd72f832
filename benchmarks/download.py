"""Pictures a second from a web that is slow and half broken: ours, the original's loop, img2dataset, the processors' limit.

    python -m benchmarks.download [--img2dataset .venv-img2dataset/bin/img2dataset] [--urls 3000]

A server of its own process on 64 loopback addresses (Linux) plays the web. In the table `download` an answer takes 20 to
500 ms, and 30 % of the addresses are dead or slow: 12 % not found, 6 % refuse, 6 % never answer, 6 % take 4 s. In
`download_near` all answer at once, so that the processors are what binds. Photograph-like JPEGs of 0.8 to 3 megapixels come
down to 512 px at quality 95. Times are of whole runs, from the command to its end; memory is the peak of all
processes of a run together (proportional set size).
"""

import argparse
import asyncio
import io
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

import download_regularization_images as stage
from benchmarks.tables import report

HOSTS = [f"127.0.0.{i}" for i in range(1, 65)]
SIZES = [(1024, 768), (1200, 800), (1280, 1280), (1600, 1067), (1920, 1280), (2048, 1536)]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--urls", type=int, default=3000, help="rows of the table (%(default)s)")
    parser.add_argument("--original_urls", type=int, default=400, help="of them for the original's loop (%(default)s)")
    parser.add_argument("--img2dataset", help="the program in an environment of its own; left out without it")
    return parser.parse_args(argv)


def main(args):
    processors = os.cpu_count()
    bodies = [picture(i) for i in range(256)]
    start = time.perf_counter()
    with multiprocessing.Pool(processors) as pool:
        pool.map(encode, bodies[:16])
        start = time.perf_counter()
        pool.map(encode, bodies, chunksize=4)
        limit = len(bodies) / (time.perf_counter() - start)

    for name, near in (("download", False), ("download_near", True)):
        context = multiprocessing.get_context("spawn")
        ready, end = context.Pipe(duplex=False)
        server = context.Process(target=serve, args=(end, near), daemon=True)
        server.start()
        port = ready.recv()
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            urls = [address(i, port, near) for i in range(args.urls)]
            table = write_table(folder / "urls.jsonl", urls)
            few = write_table(folder / "few.jsonl", urls[: args.original_urls])
            if not near:
                command = [sys.executable, "-m", "benchmarks.download", "--original", few, folder / "original"]
                rows.append(measure("plain: the original's loop, 16 processes", command, folder / "original"))
            if args.img2dataset:
                command = [args.img2dataset, "--url_list", table, "--input_format", "jsonl", "--output_folder"]
                command += [folder / "img2dataset", "--url_col", "url", "--caption_col", "caption", "--image_size", 512]
                command += ["--resize_mode", "keep_ratio", "--resize_only_if_bigger", "True", "--timeout", 10]
                command += ["--processes_count", processors, "--thread_count", 256]
                command += ["--number_sample_per_shard", -(-args.urls // processors)]
                rows.append(measure("img2dataset 1.47", command, folder / "img2dataset"))
            command = [sys.executable, "download_regularization_images.py", "--urls", table, "--output_folder"]
            command += [folder / "ours", "--allow_private", "--num_workers", 256, "--timeout", 10]
            rows.append(measure("ours", command, folder / "ours"))
        rows.append({"what": "limit: decode, resize, encode alone", "speed": limit, "peak_gib": None})
        report(name, rows, urls=args.urls, processors=processors)
        server.terminate()
        server.join()


def encode(body: bytes) -> bytes:
    return stage.encode(body, stage.parse_args([]))


def measure(what: str, command: list, output: Path) -> dict:
    """Run a command; return a row with the pictures a second that it left in `output`, and its processes' peak memory."""
    start, peak = time.perf_counter(), 0
    with open(output.with_suffix(".log"), "w+") as log:
        process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log)
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(0.2)
        seconds = time.perf_counter() - start
        log.seek(0)
        if process.returncode:
            raise SystemExit(f"{what} failed:\n{log.read()[-2000:]}")
    pictures = sum(1 for _ in output.rglob("*.jpg"))
    print(f"{what}: {pictures} pictures in {seconds:.1f} s", flush=True)
    return {"what": what, "speed": pictures / seconds, "peak_gib": peak / 2**20, "pictures": pictures}


def memory(pid: int) -> int:
    """Return the proportional set size of a process and all below it, in KiB."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        below = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:  # it has just ended
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) + sum(map(memory, below))


# ---------------------------------------------------------------------------------------------------------------------
# The web


@cache
def photograph(kind: int) -> bytes:
    """Return a JPEG with as much detail as a photograph: noise on all scales, equally strong on each octave."""
    random_numbers = np.random.default_rng(kind)
    width, height = SIZES[kind % len(SIZES)]
    pixels = np.full((height, width, 3), 128.0)
    for cells in (2, 8, 32, 128, 512):
        noise = random_numbers.normal(0, 40 / np.log2(2 * cells), (cells, cells, 3)) + 128
        layer = Image.fromarray(noise.clip(0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        pixels += np.asarray(layer, float) - 128
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def picture(number: int) -> bytes:
    """Return picture `number`, unlike all others: one of 24 photographs with one step of its quantization changed."""
    kind, variant = number % 24, number // 24
    body = bytearray(photograph(kind))
    table = (
        body.index(b"\xff\xdb") + 5
    )  # 64 steps of lightness, from low to high frequencies; colour's follow 69 bytes on
    position = table + 69 * (variant % 2) + 1 + variant // 2 % 9
    body[position] = min(255, body[position] + 1 + variant // 18)
    return bytes(body)


def fate(number: int, near: bool) -> tuple[str, float]:
    """Return what becomes of a request (200, 404, refused, silent) and the seconds it takes."""
    draw = random.Random(number)
    latency, luck = draw.uniform(0.02, 0.5), draw.random()
    if near:
        return "200", 0
    for share, what, seconds in ((0.12, "404", latency), (0.06, "refused", 0), (0.06, "silent", 60), (0.06, "200", 4)):
        if luck < share:
            return what, seconds
        luck -= share
    return "200", latency


def address(number: int, port: int, near: bool) -> str:
    refused = fate(number, near)[0] == "refused"
    return f"http://{HOSTS[number % len(HOSTS)]}:{1 if refused else port}/{number}.jpg"


def write_table(path: Path, urls: list[str]) -> Path:
    path.write_text("".join(json.dumps({"url": url, "caption": f"picture {i}"}) + "\n" for i, url in enumerate(urls)))
    return path


def serve(end, near: bool):
    async def answer(reader, writer):
        try:
            while request := await reader.readuntil(b"\r\n\r\n"):
                number = int(request.split()[1][1:-4])
                what, seconds = fate(number, near)
                await asyncio.sleep(seconds)
                body = picture(number) if what == "200" else b"not found"
                status = b"200 OK" if what == "200" else b"404 Not Found"
                writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n" % (status, len(body)))
                writer.write(body)
                await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()

    async def run():
        server = await asyncio.start_server(answer, HOSTS[0], 0, backlog=4096)
        port = server.sockets[0].getsockname()[1]
        others = await asyncio.start_server(answer, HOSTS[1:], port, backlog=4096)
        for kind in range(24):
            photograph(kind)
        end.send(port)
        await asyncio.gather(server.serve_forever(), others.serve_forever())

    asyncio.run(run())


# ---------------------------------------------------------------------------------------------------------------------
# The original's way: 16 loaders, each fetches and decodes its share one by one, the main process saves


def original(table: Path, folder: Path):
    import requests
    import torch

    rows = [json.loads(line) for line in table.read_text().splitlines()]

    class Pictures(torch.utils.data.IterableDataset):
        def __iter__(self):
            worker = torch.utils.data.get_worker_info()
            for row in rows[worker.id :: worker.num_workers]:
                try:
                    body = requests.get(row["url"], timeout=2).content
                    yield row, Image.open(io.BytesIO(body)).convert("RGB")
                except Exception:
                    yield row, None

    folder.mkdir()
    loader = torch.utils.data.DataLoader(Pictures(), batch_size=1, num_workers=16, collate_fn=lambda items: items[0])
    with open(folder / "rows.jsonl", "w") as file:
        for number, (row, image) in enumerate(loader):
            if image is not None:
                image.save(folder / f"{number}.jpg", quality=95)
                file.write(json.dumps({"file_name": f"{number}.jpg", "caption": row["caption"]}) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--original"]:
        original(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main(parse_args())
