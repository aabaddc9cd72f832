"""Choose the images that stand out among those of their prompt, the best for training and the worst for the negative prompt.

    python select_training_images.py --positive_folder positive --negative_folder negative \\
        --meta_file diffusiondb_hps.jsonl --output_meta annotation.jsonl
    python select_training_images.py --meta_file diffusiondb_hps.jsonl --dry_run       # only says what it would choose
    python select_training_images.py --meta_file diffusiondb_hps.jsonl --dry_run --report report    # and shows it

Reads   META_FILE, as process_diffusiondb.py writes it, and the chosen images from the zips that it was made of. Zips of the
        hub that are not in its cache are read there by range requests: the chosen images and the lists, nothing else.
Writes  POSITIVE_FOLDER/ and NEGATIVE_FOLDER/: the chosen images as JPEG, named by part and image, transparency on white
        OUTPUT_META, a row a chosen image, when all are there: id (of META_FILE), file_name (relative to OUTPUT_META's own
        folder, in which both folders lie), prompt, type (positive or negative), confidence (p below), batch_size (n below)
        OUTPUT_META.errors.jsonl (chosen, but not readable), OUTPUT_META.run.json (options, counts)
        with --report FOLDER: FOLDER/index.html, what was dropped and why, histograms, and examples with their siblings

Black and blurry images and repeated pictures are dropped, then prompts with fewer than --min_images. Among the n images of a prompt
(paper, section 5.1)

    p_i = exp(HPS_i) / sum_j exp(HPS_j)        positive: the image of the largest p, if p > threshold / n

and the negative is chosen in the same way with -HPS. Rows are known by their part and image: their order, their ids and what
was filtered out of META_FILE do not matter. A killed run keeps the images that it has saved.
"""

import argparse
import io
import json
import multiprocessing
import os
import re
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from utils import diffusiondb, jsonl, runs, scored_rows, selection_report
from utils.errors import UserError, one_line_errors
from utils.images import open_image, to_rgb


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meta_file", default="diffusiondb_hps.jsonl")
    parser.add_argument("--source_dataset", help="where the images are (default: what META_FILE.run.json says)")
    parser.add_argument("--cache_dir", help="where the hub's parts are kept (default: the hub's cache)")
    parser.add_argument("--positive_folder", default="positive")
    parser.add_argument("--negative_folder", default="negative")
    parser.add_argument("--output_meta", default="annotation.jsonl")
    # The rule.
    parser.add_argument("--min_images", type=int, default=4, help="a prompt needs so many")
    parser.add_argument("--threshold", type=float, default=2.0, help="an image is chosen if p > threshold / n")
    parser.add_argument(
        "--normalize_prompts", action="store_true", help="take prompts that differ in case or space for one"
    )
    # How many; the paper trained on 37,572 positives and 21,108 negatives, about half of the negatives that it had.
    parser.add_argument("--num_positive", type=int, help="keep so many, drawn at random (default: all)")
    parser.add_argument("--num_negative", type=int, help="keep so many, drawn at random (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of that draw")
    # Machinery.
    parser.add_argument("--quality", type=int, default=95, help="of the JPEG")
    parser.add_argument("--num_workers", type=int, default=4, help="processes that decode and save images")
    parser.add_argument("--dry_run", action="store_true", help="print counts and a histogram, select nothing")
    parser.add_argument("--report", help="write a page with histograms and examples into this folder")
    parser.add_argument("--overwrite", action="store_true", help="replace a selection made with other options")
    return parser.parse_args(argv)


def main(args):
    started = time.time()
    check_options(args)

    # Read the scores, and find the image that stands out in each prompt, upwards and downwards.
    meta = scored_rows.read(args.meta_file)
    groups, counts = group_by_prompt(meta, args)
    best, worst = stand_out(groups, +1), stand_out(groups, -1)
    source = args.source_dataset or recorded_source(args.meta_file)
    if args.report:
        report(meta, groups, best, worst, counts, source, args)
    if args.dry_run:
        describe(best, worst, counts)
        return

    # Choose by the rule.
    winners = choose(meta, best, "positive", args.num_positive, args)
    winners += choose(meta, worst, "negative", args.num_negative, args)
    if not winners:
        raise UserError(f"{args.meta_file}: no image has p > {args.threshold:g} / n; --dry_run shows what would do")

    # Save what is not there yet, refusing to mix it with another selection.
    record = begin(args, source)
    errors, fetched = save_images(winners, source, args)

    # List what was saved, last of all.
    rows = sorted((w for w in winners if name(w) not in errors), key=lambda w: (w["part"], w["image"]))
    if not rows:
        raise UserError(
            f"{source}: none of the {len(winners)} chosen images can be read: {next(iter(errors.values()))}"
        )
    write_annotation(rows, errors, args)
    counts |= {kind: sum(row["type"] == kind for row in rows) for kind in ("positive", "negative")}
    counts |= {"errors": len(errors), "fetched_bytes": fetched}
    runs.finish(f"{args.output_meta}.run.json", record, **counts, seconds=round(time.time() - started, 1))
    print(
        f"{counts['positive']} positive and {counts['negative']} negative images of {counts['prompts']} prompts in {args.output_meta}"
        + (f"; {len(errors)} could not be read, see {args.output_meta}.errors.jsonl" if errors else "")
        + (f"; {fetched / 1e6:,.1f} MB came from the hub" if fetched else "")
    )


def check_options(args):
    if args.threshold < 1:
        raise UserError(f"--threshold {args.threshold:g}: at least 1, where every image but the average one passes")
    if args.min_images < 1 or not 1 <= args.quality <= 100 or args.num_workers < 0:
        raise UserError("--min_images is at least 1, --quality from 1 to 100, --num_workers at least 0")
    if min(args.num_positive or 0, args.num_negative or 0) < 0:
        raise UserError("--num_positive and --num_negative are at least 0")


# --- the rule ---


class Groups(NamedTuple):
    rows: np.ndarray  # of the meta file, those of a prompt side by side
    scores: np.ndarray  # of these
    starts: np.ndarray  # where in `rows` each prompt begins
    sizes: np.ndarray  # n of each prompt


def group_by_prompt(meta: pa.Table, args) -> tuple[Groups, dict[str, int]]:
    """Drop what cannot be chosen and group the rest by prompt; count both."""
    part, score, blurry, prompt, pixels = (
        scored_rows.numbers(meta, f) for f in ("part", "score", "blurry", "prompt", "pixels")
    )
    image = meta["image"].combine_chunks()
    counts = {"rows": len(meta)}

    # A row may come twice in files put together from several; two different rows of one image may not.
    again = (part[1:] == part[:-1]) & pc.equal(image[1:], image[:-1]).to_numpy(zero_copy_only=False)
    differ = (score[1:] != score[:-1]) | (blurry[1:] != blurry[:-1]) | (prompt[1:] != prompt[:-1])
    if (again & differ).any():
        i = int(np.argmax(again & differ))
        raise UserError(f"{args.meta_file}: image {image[i]} of part {part[i]} has two different rows")
    again = np.concatenate([[False], again])
    code = meta["pixels"].combine_chunks().dictionary.index("black").as_py()
    black = (pixels == code) & (code >= 0)
    counts |= {"repeated_rows": int(again.sum()), "black": int((black & ~again).sum())}
    counts["blurry"] = int((blurry & ~black & ~again).sum())
    rows = np.flatnonzero(~again & ~black & ~blurry)

    # Of equal pictures the first one stays.
    known = pixels[rows] >= 0
    first = np.unique(pixels[rows[known]], return_index=True)[1]
    counts["repeated_pictures"] = int(known.sum()) - len(first)
    rows = np.sort(np.concatenate([rows[~known], rows[known][first]]))

    # Group by prompt.
    if args.normalize_prompts:
        same = normalized(meta["prompt"].combine_chunks().dictionary)
        counts["merged_prompts"] = len(same) - (int(same.max(initial=-1)) + 1)
        prompt = same[prompt]
    enough = np.bincount(prompt[rows], minlength=1) >= args.min_images
    counts["in_prompts_with_too_few"] = len(rows)
    rows = rows[enough[prompt[rows]]]
    counts["in_prompts_with_too_few"] -= len(rows)
    rows = rows[np.argsort(prompt[rows], kind="stable")]
    starts = np.flatnonzero(np.diff(prompt[rows], prepend=-1))
    sizes = np.diff(starts, append=len(rows))
    counts |= {"images": len(rows), "prompts": len(starts)}
    return Groups(rows, score[rows], starts, sizes), counts


def normalized(prompts: pa.Array) -> np.ndarray:
    """Return a number for each prompt, the same for those that differ only in case or white space."""
    known = {}
    return np.array([known.setdefault(" ".join(p.casefold().split()), len(known)) for p in prompts.to_pylist()], int)


class Outstanding(NamedTuple):
    rows: np.ndarray  # of the meta file, one a prompt
    p: np.ndarray
    n: np.ndarray


def stand_out(groups: Groups, sign: int) -> Outstanding:
    """Return the image of the largest p = softmax(sign * score) in each prompt, the first of equal ones."""
    if not len(groups.starts):
        return Outstanding(groups.rows, groups.scores, groups.sizes)
    scores = sign * groups.scores
    top = np.repeat(np.maximum.reduceat(scores, groups.starts), groups.sizes)
    p = 1 / np.add.reduceat(np.exp(scores - top), groups.starts)
    place = np.where(scores == top, np.arange(len(scores)), len(scores))
    return Outstanding(groups.rows[np.minimum.reduceat(place, groups.starts)], p, groups.sizes)


def choose(meta: pa.Table, outstanding: Outstanding, kind: str, number: int | None, args) -> list[dict]:
    """Return what passes the threshold, or `number` of it, drawn at random."""
    rows, p, n = outstanding
    chosen = np.flatnonzero(p > args.threshold / n)
    chosen = chosen[np.argsort(rows[chosen])]
    if number is not None and number < len(chosen):
        draw = np.random.default_rng([args.seed, kind == "negative"]).permutation(len(chosen))
        chosen = chosen[np.sort(draw[:number])]
    elif number is not None and number > len(chosen):
        print(f"{kind}: only {len(chosen)} images pass the threshold, not {number}")
    named = meta.select(["id", "prompt", "part", "image"]).take(rows[chosen]).to_pylist()
    return [
        row | {"type": kind, "confidence": round(float(p[i]), 6), "batch_size": int(n[i])}
        for row, i in zip(named, chosen, strict=True)
    ]


def describe(best: Outstanding, worst: Outstanding, counts: dict[str, int]):
    """Print how many rows were dropped and why, and what each threshold would choose."""
    for what, count in counts.items():
        print(f"{count:12,}  {what.replace('_', ' ')}")
    passing = what_passes(best, worst)
    print("\n threshold    positive    negative    images whose p * n lies between this threshold and the next")
    between = -np.diff([positive + negative for _, positive, negative in passing], append=0)
    for (edge, positive, negative), count in zip(passing, between, strict=True):
        print(f"{edge:10.2f}{positive:12,}{negative:12,}    {'#' * round(60 * count / max(between.max(), 1))}")


def what_passes(best: Outstanding, worst: Outstanding) -> list[tuple[float, int, int]]:
    """Return (threshold, positives, negatives) for a few thresholds."""
    edges = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 7, 10)
    return [(edge, *(int((side.p * side.n > edge).sum()) for side in (best, worst))) for edge in edges]


def report(meta: pa.Table, groups: Groups, best: Outstanding, worst: Outstanding, counts: dict, source: str, args):
    """Write the page of --report."""
    sides = {"positive": best, "negative": worst}
    parts = {part.number: part for part in diffusiondb.find_parts(source)}

    def open_part(number: int):
        if number not in parts:
            raise ValueError(f"there is no part {number} in {source}")
        return diffusiondb.open_part_anywhere(parts[number], args.cache_dir)

    counts = dict(counts)
    for kind, side in sides.items():
        chosen = int((side.p > args.threshold / side.n).sum())
        counts |= {f"prompts_below_the_threshold_{kind}": len(side.p) - chosen, f"chosen_{kind}": chosen}
    passing = what_passes(best, worst)
    selection_report.write(args.report, sides, groups, meta, counts, passing, args.threshold, open_part)
    print(f"{args.report}/index.html shows the histograms and examples")


# --- the images ---


def recorded_source(meta_file: str) -> str:
    """Return the source that a meta file was made of, by its record, or else the paper's."""
    try:
        return json.loads(Path(f"{meta_file}.run.json").read_text())["settings"]["source_dataset"]
    except (OSError, ValueError, KeyError, TypeError):
        return "large_first_1m"


def begin(args, source: str) -> dict:
    """Record what the selection depends on, or go on with the same; `--overwrite` removes the images of another."""
    record_path, output = Path(f"{args.output_meta}.run.json"), Path(args.output_meta)
    folders = [Path(args.positive_folder), Path(args.negative_folder)]
    rule = ("min_images", "threshold", "normalize_prompts", "num_positive", "num_negative", "seed", "quality")
    settings = {
        "meta_sha256": runs.sha256(args.meta_file),
        "source_dataset": diffusiondb.name_source(source),
        **{option: getattr(args, option) for option in rule},
        "folders": [relative(folder, output.parent).as_posix() for folder in folders],
    }
    for folder in (*folders, output.parent):
        folder.mkdir(parents=True, exist_ok=True)
    old = [path for folder in folders for path in folder.iterdir() if re.fullmatch(r"\d{6,}-.+\.jpg", path.name)]
    old += [output] if output.exists() else []
    try:
        if old and not record_path.exists():
            raise UserError(
                f"{old[0]}: of unknown origin, as {record_path} is missing; use --overwrite or another place"
            )
        return runs.begin(record_path, settings)
    except UserError:
        if not args.overwrite:
            raise
    for path in old:
        path.unlink(missing_ok=True)
    return runs.begin(record_path, settings, overwrite=True)


def save_images(winners: list[dict], source: str, args) -> tuple[dict[str, str], int]:
    """Save the images that are not there yet, in the order of their zips.

    Return why some could not be, and how many bytes came from the hub.
    """
    parts = {part.number: part for part in diffusiondb.find_parts(source)}
    todo, errors = {}, {}
    for winner in winners:
        if winner["part"] not in parts:
            errors[name(winner)] = f"there is no part {winner['part']} in {source}"
        elif not target(winner, args).exists():
            todo.setdefault(winner["part"], []).append((winner["image"], winner["prompt"], str(target(winner, args))))
    jobs = [(parts[number], images) for number, images in sorted(todo.items())]
    fetched = 0
    bar = tqdm(total=sum(len(images) for _, images in jobs), desc="saving", unit="image", disable=not jobs)
    work = partial(save_part, cache_dir=args.cache_dir, quality=args.quality)
    # Processes, as decoding keeps Python's lock; spawned, as Arrow's threads do not survive a fork.
    workers = min(args.num_workers, len(jobs))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn) if workers > 1 else nullcontext() as pool:
        for (part, images), (failed, size) in zip(jobs, (pool.map if pool else map)(work, jobs), strict=True):
            errors |= {name({"part": part.number, "image": image}): why for image, why in failed.items()}
            fetched += size
            bar.update(len(images))
    bar.close()
    return errors, fetched


def save_part(job: tuple, cache_dir: str | None, quality: int) -> tuple[dict[str, str], int]:
    """Save images (image, prompt, file) of one part as JPEG, each whole or not at all, in the order of the zip.

    Return why some could not be, and how many bytes came from the hub.
    """
    part, images = job
    errors = {}
    try:
        archive = diffusiondb.open_part_anywhere(part, cache_dir)
        prompts = {row.image: row.prompt for row in diffusiondb.read_rows(archive, part.number)[0]}
    except UserError:
        raise
    except ValueError as why:
        return {image: str(why) for image, _, _ in images}, 0
    offsets = {info.filename: info.header_offset for info in archive.infolist()}
    for image, prompt, file in sorted(images, key=lambda job: offsets.get(job[0], 0)):
        encoded = io.BytesIO()
        try:
            if prompts.get(image) != prompt:
                raise ValueError("of another prompt in this source, or of none")
            picture = open_image(io.BytesIO(diffusiondb.read_image(archive, image)))
            to_rgb(picture).save(encoded, "JPEG", quality=quality)
        except UserError:
            raise
        except Exception as why:  # one strange picture must not stop the others
            errors[image] = diffusiondb.reason(why)
            continue
        jsonl.write_whole(file, encoded.getvalue())
    return errors, getattr(archive.fp, "fetched", 0)


def name(winner: dict) -> str:
    """Return what names an image for ever."""
    return f"{winner['part']:06d}-{winner['image']}"


def target(winner: dict, args) -> Path:
    return Path(args.positive_folder if winner["type"] == "positive" else args.negative_folder, name(winner) + ".jpg")


def write_annotation(rows: list[dict], errors: dict[str, str], args):
    base = Path(args.output_meta).parent
    folders = {"positive": relative(args.positive_folder, base), "negative": relative(args.negative_folder, base)}
    lines = [
        {
            "id": row["id"],
            "file_name": (folders[row["type"]] / f"{name(row)}.jpg").as_posix(),
            **{field: row[field] for field in ("prompt", "type", "confidence", "batch_size")},
        }
        for row in rows
    ]
    skipped = [{"item": item, "stage": "save", "reason": why} for item, why in sorted(errors.items())]
    jsonl.write_whole(f"{args.output_meta}.errors.jsonl", "".join(map(jsonl.dumps, skipped)))
    jsonl.write_whole(args.output_meta, "".join(map(jsonl.dumps, lines)))


def relative(folder: str | Path, base: Path) -> Path:
    """Return a folder as seen from `base`; UserError if it lies elsewhere, as no stage follows a file name out of a folder."""
    try:
        return Path(os.path.abspath(folder)).relative_to(os.path.abspath(base))
    except ValueError:
        raise UserError(f"{folder}: should lie in the folder of --output_meta, {os.path.abspath(base)}") from None


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
