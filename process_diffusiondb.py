"""Score the images of DiffusionDB with the Human Preference Classifier, and mark the blurry ones.

    python process_diffusiondb.py --clip_checkpoint hpc.pth --meta_file diffusiondb_hps.jsonl
    accelerate launch process_diffusiondb.py --clip_checkpoint hpc.pth --meta_file diffusiondb_hps.jsonl

Reads   the parts of --source_dataset, each a zip of 1,000 images and a JSON with their prompts: a subset on the hub
        (large_first_1m, the paper's; 2m_first_1k; large_all; 2m_all; large:2-1001) or a local folder of part-000002.zip ...
        The hub's parts are downloaded ahead of their turn, and removed when their rows are written unless --keep_parts
        (large_first_1m takes 460 GB); parts that are in the hub's cache already are used, and stay.
Writes  META_FILE, a row an image: id (part * 1,000,000 + position in the part), prompt, score (100 cos), blurry, part, image
        (these two name the image for ever), pixels (equal for equal pictures; "black" for black ones)
        META_FILE.errors.jsonl (what was skipped, and why), META_FILE.run.json (options, checksums, counts)
        META_FILE.parts/: the rows of each part, written whole, from which META_FILE is put together when all are there;
        and zips/, the parts that are being scored

Parts are dealt to the processes, part i to rank i mod N, and META_FILE is the same bytes for every N. A killed run loses at
most the parts in work, and goes on with any N. A part that cannot be read at all is tried again by the next run.
"""

import argparse
import hashlib
import io
import math
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils import diffusiondb, hub, ranks, runs
from utils.errors import UserError, one_line_errors
from utils.images import open_image, to_rgb
from utils.jsonl import dumps, write_whole


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source_dataset", default="large_first_1m", help=diffusiondb.SOURCES)
    parser.add_argument("--meta_file", default="diffusiondb_hps.jsonl")
    # Parts from the hub.
    parser.add_argument(
        "--prefetch_parts", type=int, default=2, help="downloaded ahead, about 0.5 GB each (default: 2)"
    )
    parser.add_argument("--keep_parts", action="store_true", help="keep them in --cache_dir")
    parser.add_argument("--cache_dir", help="where kept parts are (default: the hub's cache)")
    # The classifier.
    parser.add_argument("--clip_checkpoint", required=True, help="hpc.pth")
    parser.add_argument("--model", help="open_clip name or JSON config (default: the checkpoint's, else ViT-L/14)")
    parser.add_argument("--resize", choices=["crop", "pad"], help="default: the checkpoint's, else crop, CLIP's own")
    parser.add_argument("--precision", choices=["fp32", "fp16"], default="fp32", help="default: fp32")
    # The blur test.
    parser.add_argument(
        "--blur_threshold", type=float, default=10, help="blurry: neighbours differ by less, of 255 levels of grey"
    )
    # Machinery.
    parser.add_argument("--batch_size", type=int, default=64, help="images a forward pass")
    parser.add_argument("--num_workers", type=int, default=4, help="processes that decode images, 80 a second each")
    parser.add_argument("--device", help="default: this process's GPU, else the CPU")
    parser.add_argument("--overwrite", action="store_true", help="replace rows made with other options")
    ranks.add_arguments(parser)
    return parser.parse_args(argv)


def main(args):
    started = time.time()
    rank, world_size = ranks.rank_and_world_size(args)
    if args.batch_size < 1 or min(args.num_workers, args.prefetch_parts) < 0:
        raise UserError("--batch_size is at least 1, --num_workers and --prefetch_parts at least 0")
    parts = diffusiondb.find_parts(args.source_dataset)
    mine = parts[rank::world_size]

    from utils import hps  # slow to import: help and mistakes need not wait for it

    # Load the classifier, see what is there, and refuse to mix it with rows of another one.
    scorer = hps.load(
        args.clip_checkpoint, args.model, ranks.device(args.device), precision=args.precision, resize=args.resize
    )
    record = begin(args, scorer)

    # Score the missing parts of this rank.
    todo = [part for part in mine if not file_of(args, part).exists()]
    score_parts(todo, scorer, args, rank)

    # The rank that finds every part there puts the rows together.
    if all(file_of(args, part).exists() or file_of(args, part, FAILED).exists() for part in parts):
        counts = merge(args, parts)
        seconds = {"seconds": round(time.time() - started, 1)} if todo else {}
        runs.finish(f"{args.meta_file}.run.json", record, **counts, **seconds)
        print(
            f"{counts['images']} images of {counts['parts']} parts in {args.meta_file}, {counts['blurry']} of them blurry"
            f"; {counts['errors']} entries in {args.meta_file}.errors.jsonl"
            + (f"; {counts['failed_parts']} parts could not be read at all" if counts["failed_parts"] else "")
        )
    else:
        print(f"rank {rank} of {world_size} has done its parts; {args.meta_file} is written when the others' are there")


# --- what is on disk ---

ERRORS, FAILED = ".errors.jsonl", ".failed.jsonl"


def file_of(args, part: diffusiondb.Part, kind: str = ".jsonl") -> Path:
    """Return the file of a part's rows, or its ERRORS; FAILED stands in for the rows of a part that cannot be read."""
    return Path(f"{args.meta_file}.parts", f"part-{part.number:06d}{kind}")


def zips(args) -> Path:
    """Return the folder for parts from the hub that are not kept."""
    return Path(f"{args.meta_file}.parts", "zips").resolve()  # as the hub's library names what it puts there


def begin(args, scorer) -> dict:
    """Record what the rows depend on, or go on with rows of the same; `--overwrite` removes those of others."""
    settings = {
        "checkpoint_sha256": runs.sha256(args.clip_checkpoint),
        "model": scorer.config,
        "resize": scorer.resize,
        "precision": args.precision,
        "blur_threshold": args.blur_threshold,
        "source_dataset": diffusiondb.name_source(args.source_dataset),
    }
    record_path, meta = Path(f"{args.meta_file}.run.json"), Path(args.meta_file)
    folder = Path(f"{args.meta_file}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not record_path.exists() and (meta.exists() or any(folder.glob("part-*.jsonl"))):
            raise UserError(f"{meta}: of unknown origin, as {record_path} is missing; use --overwrite or another place")
        return runs.begin(record_path, settings)
    except UserError:
        if not args.overwrite:
            raise
    # Whichever rank comes first clears for all; the others then find their own settings.
    for path in (meta, Path(f"{meta}.errors.jsonl"), *folder.glob("part-*.jsonl")):
        path.unlink(missing_ok=True)
    return runs.begin(record_path, settings, overwrite=True)


def save_part(args, part: diffusiondb.Part, rows: list[dict] | None, errors: list[dict]):
    """Write a part's rows, last, or that it has failed."""
    write_whole(file_of(args, part, FAILED if rows is None else ERRORS), "".join(map(dumps, errors)))
    if rows is not None:
        write_whole(file_of(args, part), "".join(map(dumps, rows)))


def merge(args, parts: list[diffusiondb.Part]) -> dict:
    """Put the rows and the errors of all parts together, in the order of the parts; return counts."""
    counts = {"parts": len(parts), "failed_parts": 0, "images": 0, "blurry": 0, "errors": 0}

    def rows():
        for part in parts:
            if file_of(args, part).exists():
                content = file_of(args, part).read_bytes()
                counts["images"] += content.count(b"\n")
                counts["blurry"] += content.count(b'"blurry": true')  # within a prompt the quotes are escaped
                yield content

    def errors():
        for part in parts:
            failed = not file_of(args, part).exists()
            content = file_of(args, part, FAILED if failed else ERRORS).read_bytes()
            counts["failed_parts"] += failed
            counts["errors"] += content.count(b"\n")
            yield content

    write_whole(f"{args.meta_file}.errors.jsonl", errors())
    write_whole(args.meta_file, rows())
    if not counts["failed_parts"]:  # else another rank may be trying one of them again
        shutil.rmtree(zips(args), ignore_errors=True)  # what killed runs have left there
    return counts


# --- scoring ---


class Done(NamedTuple):
    """All rows of a part have been handed out, or, if it has failed, there are none."""

    part: diffusiondb.Part
    path: str | None
    errors: list[dict]
    failed: bool


def score_parts(parts: list[diffusiondb.Part], scorer, args, rank: int):
    """Score the parts in turn, writing the rows of each as soon as its last image is scored.

    One DataLoader runs through all parts, so the workers decode the next part while this one is finished; prompts are
    encoded and rows written in a thread, so the next part's images need not wait either. A batch never holds images of
    two parts, so no score depends on which parts a process was dealt.
    """
    from torch.utils.data import DataLoader

    if not parts:
        return
    loader = DataLoader(
        Pictures(scorer.preprocess, args.blur_threshold),
        sampler=batches(parts, args, zips(args) / str(rank)),
        batch_size=None,
        collate_fn=as_it_is,
        num_workers=args.num_workers,
        pin_memory=scorer.device.type == "cuda",
    )
    finishing = None
    decoded, features, errors = [], [], []
    with ThreadPoolExecutor(1) as finisher, tqdm(desc="scoring", unit="image", disable=rank != 0) as bar:
        for result in loader:
            if isinstance(result, Done):
                if finishing:
                    finishing.result()
                finishing = finisher.submit(finish_part, result, decoded, features, errors, scorer, args)
                decoded, features, errors = [], [], []
                bar.set_postfix_str(result.part.name)
                continue
            found, pixels, problems = result
            if found:
                features.append(scorer.encode_images(pixels))
            decoded += found
            errors += problems
            bar.update(len(found) + len(problems))
        finishing.result()


def finish_part(done: Done, decoded: list, features: list, errors: list[dict], scorer, args):
    """Write a part's rows and, if it is one that came for this run only, remove its zip."""
    # What the disk would not give is no fault of the part's: the next run tries it again.
    failed = done.failed or any(error["stage"] == "read" for error in errors)
    rows = None if failed else make_rows(done.part, decoded, features, errors, scorer)
    save_part(args, done.part, rows, done.errors + errors)
    if done.path and Path(done.path).is_relative_to(zips(args)):
        hub.remove(done.path)


def batches(parts: list[diffusiondb.Part], args, folder: Path) -> Iterator:
    """Yield each part as batches (part, path, rows) and a Done; the DataLoader asks a few batches ahead of the scoring."""
    for part, fetching in fetch_ahead(parts, args, folder):
        path = None
        try:
            path = fetching.result()
            with diffusiondb.open_part(path) as archive:
                rows, problems = diffusiondb.read_rows(archive, part.number)
        except UserError:
            raise
        except ValueError as why:
            yield Done(part, path, [error_row(part, "", "open", str(why))], failed=True)
            continue
        for start in range(0, len(rows), args.batch_size):
            yield part, path, rows[start : start + args.batch_size]
        yield Done(part, path, [error_row(part, image, "index", why) for image, why in problems], failed=False)


def fetch_ahead(parts: list[diffusiondb.Part], args, folder: Path) -> Iterator[tuple[diffusiondb.Part, Future]]:
    """Yield each part with its path to be, while the next `--prefetch_parts` are on their way into `folder`."""
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run of this rank has left there

    def fetch(part):
        kept = args.keep_parts or not part.on_hub or diffusiondb.cached(part, args.cache_dir)
        return diffusiondb.fetch(part, args.cache_dir if kept else str(folder))

    pool = ThreadPoolExecutor(max(args.prefetch_parts, 1))
    try:
        ahead = deque()
        for part in parts:
            ahead.append((part, pool.submit(fetch, part)))
            if len(ahead) > args.prefetch_parts:
                yield ahead.popleft()
        yield from ahead
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class Pictures:
    """Decodes a batch of rows, in a worker: what was found of each picture, their pixels, and errors for the others."""

    def __init__(self, preprocess, blur_threshold: float):
        self.preprocess, self.blur_threshold = preprocess, blur_threshold
        self.path = self.archive = None

    def __getitem__(self, batch):
        import torch

        if isinstance(batch, Done):
            return batch
        part, path, rows = batch
        found, pixels, errors = [], [], []
        for row in rows:
            try:
                if self.path != path:  # a worker keeps its zip open from batch to batch
                    self.archive, self.path = diffusiondb.open_part(path), path
                image = open_image(io.BytesIO(diffusiondb.read_image(self.archive, row.image)))
                plain = to_rgb(image)
                found_out = row, is_blurry(plain, self.blur_threshold), fingerprint(plain)
                pixels.append(self.preprocess(image))
                found.append(found_out)
            except Exception as why:  # one strange picture of a million must not stop the others
                stage = "read" if isinstance(why, diffusiondb.ReadFault) else "decode"
                errors.append(error_row(part, row.image, stage, diffusiondb.reason(why)))
        return found, torch.stack(pixels) if pixels else None, errors


def as_it_is(batch):
    """Keep a batch as its worker made it (DataLoader would look into it)."""
    return batch


def make_rows(part: diffusiondb.Part, decoded: list, features: list, errors: list[dict], scorer) -> list[dict]:
    """Return a part's rows; each distinct prompt is encoded once. Scores that are no numbers become errors."""
    import torch

    from utils.hps import pair_scores

    if not decoded:
        return []
    prompts = [row.prompt for row, _, _ in decoded]
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    texts = scorer.encode_prompts(list(place))[[place[prompt] for prompt in prompts]]
    scores = pair_scores(torch.cat(features), texts)
    rows = []
    for (row, blurry, pixels), score in zip(decoded, scores.tolist(), strict=True):
        if not math.isfinite(score):
            errors.append(error_row(part, row.image, "score", f"the score is {score}"))
            continue
        # Four decimals: what is beyond depends on the batch size and the device.
        named = {"part": part.number, "image": row.image, "pixels": pixels}
        rows.append({"id": row.id, "prompt": row.prompt, "score": round(score, 4), "blurry": blurry, **named})
    return rows


def is_blurry(image: Image.Image, threshold: float) -> bool:
    """Whether no two neighbouring pixels, beside or above each other, differ by `threshold` levels of grey or more."""
    grey = np.asarray(image.convert("L"))

    def largest_step(a, b):
        return (np.maximum(a, b) - np.minimum(a, b)).max(initial=0)  # in uint8 a bare difference would wrap around

    return bool(max(largest_step(grey[1:], grey[:-1]), largest_step(grey[:, 1:], grey[:, :-1])) < threshold)


def fingerprint(image: Image.Image) -> str:
    """Return 16 hexadecimal digits that are equal for equal pictures, or "black" for what is nothing but black."""
    if image.getbbox() is None:
        return "black"
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:16]


def error_row(part: diffusiondb.Part, image: str, stage: str, why: str) -> dict:
    return {"item": f"{part.name}/{image}" if image else part.name, "stage": stage, "reason": why}


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
