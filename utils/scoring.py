"""Scoring pictures with a loaded classifier (utils/hps.py): decoded by workers, batch by batch, into files that a rerun goes on with.

A file of scores holds a row of file_name, caption and score (100 * cosine) a picture; FILE.run.json beside it records what
they depend on.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils import jsonl, runs
from utils.errors import UserError
from utils.images import open_image


def add_arguments(parser):
    """Add how pictures are scored; `check_arguments` looks at the numbers."""
    parser.add_argument("--model", help="open_clip name or JSON config (default: the checkpoint's, else ViT-L/14)")
    parser.add_argument("--resize", choices=["crop", "pad"], help="default: the checkpoint's, else crop, CLIP's own")
    parser.add_argument("--precision", choices=["fp32", "fp16"], default="fp32", help="default: fp32")
    parser.add_argument("--batch_size", type=int, default=16, help="pictures; scores do not depend on it (default: 16)")
    parser.add_argument("--num_workers", type=int, default=4, help="processes that decode pictures (default: 4)")
    parser.add_argument("--device", help="default: the GPU if there is one, else the CPU")


def check_arguments(args):
    if args.batch_size < 1 or args.num_workers < 0:
        raise UserError("--batch_size should be 1 or more, --num_workers 0 or more")


# --- a folder and its meta file ---


def read_pairs(meta_file: str | Path, folder: Path) -> list[tuple[str, str]]:
    """Return (file name, caption) of every row; UserError naming the first row that is no picture in the folder."""
    first = next(jsonl.read(meta_file), None)
    if first is None:
        raise UserError(f"{meta_file}: there is no picture in it")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    file_name = "file_path" if "file_path" in first and "file_name" not in first else "file_name"
    caption = "prompt" if "prompt" in first and "caption" not in first else "caption"
    pairs = []
    for number, row in enumerate(jsonl.read(meta_file, {file_name: str, caption: str}), 1):
        path = os.path.relpath(os.path.join(folder, row[file_name]), folder)
        if path.split(os.sep)[0] == os.pardir:
            raise UserError(f"{meta_file}: row {number}: {row[file_name]!r} leads out of the image folder")
        pairs.append((row[file_name], row[caption]))
    return pairs


def score_folder(
    args, scorer, meta_file: str | Path, folder: Path, pairs, output, skip_errors: bool
) -> tuple[dict, str]:
    """Score what `read_pairs` returned; return {n, skipped, hps, standard_error} and the name of the file of errors.

    `hps` is the mean of the raw cosine over the rows. With an `output` a row a picture is written there and the result is
    recorded beside it; only what is not there yet is scored. A picture that cannot be decoded raises UserError, or with
    `skip_errors` is counted and logged. Of `args` it takes the options of `add_arguments`, `hpc` and `overwrite`.
    """
    settings = {
        "checkpoint_sha256": runs.sha256(args.hpc),
        "model": scorer.config,
        "resize": scorer.resize,
        "precision": args.precision,
        "image_folder": str(folder.resolve()),
    }
    record, appender, scores = begin_output(output, settings, folder, args.overwrite)
    errors_path = f"{output or meta_file}.errors.jsonl"
    Path(errors_path).unlink(missing_ok=True)  # a rerun tries again what was skipped

    todo = [pair for pair in dict.fromkeys(pairs) if pair not in scores]
    skipped = 0
    with appender or nullcontext(), closing(score_pairs(args, scorer, folder, todo)) as scored:
        for (file_name, caption), score, reason in scored:
            if reason is None:
                scores[file_name, caption] = score
                if appender:
                    appender.write({"file_name": file_name, "caption": caption, "score": score})
            elif skip_errors:
                skipped += 1
                with jsonl.Appender(errors_path) as errors:
                    errors.write({"item": file_name, "stage": "decode", "reason": reason})
            else:
                raise UserError(f"{folder / file_name}: {reason} (--skip_errors passes over it)")

    cosines = np.array([scores[pair] / 100 for pair in pairs if pair in scores])
    if not len(cosines):
        raise UserError(f"{meta_file}: none of the {len(pairs)} pictures can be decoded, see {errors_path}")
    n = len(cosines)
    standard_error = cosines.std(ddof=1) / n**0.5 if n > 1 else float("nan")
    results = {"n": n, "skipped": skipped, "hps": cosines.mean(), "standard_error": standard_error}
    if record:
        runs.finish(f"{output}.run.json", record, **results)
    return results, errors_path


def begin_output(output, settings: dict, folder: Path, overwrite: bool) -> tuple:
    """Return the run's record, the output to append to, and {(file name, caption): score} of what is there already."""
    if not output:
        return None, None, {}
    output, record_path = Path(output), Path(f"{output}.run.json")
    if overwrite:
        output.unlink(missing_ok=True)
    elif output.exists() and not record_path.exists():
        raise UserError(f"{output}: there is no {record_path.name} of its making; use --overwrite or another place")
    output.parent.mkdir(parents=True, exist_ok=True)
    record = runs.begin(record_path, settings, overwrite)
    scored_at = output.stat().st_mtime if output.exists() else 0.0
    appender = jsonl.Appender(output)  # before reading: it cuts a torn last line
    rows = jsonl.read(output, {"file_name": str, "caption": str, "score": (int, float)})
    scores = {(row["file_name"], row["caption"]): row["score"] for row in rows}
    # Pictures made anew under the same names must not keep the scores of the old ones.
    paths = (folder / file_name for file_name, _ in scores)
    changed = [path for path in paths if path.exists() and path.stat().st_mtime > scored_at]
    if changed:
        raise UserError(
            f"{output}: {changed[0]} and {len(changed) - 1} more changed since they were scored; use --overwrite"
        )
    return record, appender, scores


def score_pairs(args, scorer, folder: Path, pairs: list[tuple[str, str]]) -> Iterator[tuple]:
    """Yield (pair, score, None), or (pair, None, reason) if its picture cannot be decoded, in the order of the pairs."""
    import torch

    from utils.hps import pair_scores

    if not pairs:
        return
    captions = list(dict.fromkeys(caption for _, caption in pairs))
    encoded = dict(zip(captions, scorer.encode_prompts(captions), strict=True))
    paths, rest = [folder / file_name for file_name, _ in pairs], iter(pairs)
    with closing(encode_pictures(scorer, paths, open_image, args.batch_size, args.num_workers)) as batches:
        for features, reasons in batches:
            batch = [next(rest) for _ in reasons]
            good = [encoded[caption] for (_, caption), reason in zip(batch, reasons, strict=True) if reason is None]
            scores = pair_scores(features, torch.stack(good)) if good else torch.zeros(0)
            if not scores.isfinite().all():
                raise UserError(f"{args.hpc}: gives scores that are no numbers; is it sound, and --precision enough?")
            values = iter(scores.tolist())
            for pair, reason in zip(batch, reasons, strict=True):
                yield pair, round(next(values), 6) if reason is None else None, reason


# --- pictures ---


def encode_pictures(
    scorer, pictures: list, open_picture: Callable, batch_size: int, num_workers: int, show: bool = True
) -> Iterator[tuple]:
    """Yield, batch by batch, the unit vectors (n, d) of the pictures that can be decoded, and for each picture None or why not.

    `open_picture` makes a PIL image of a picture, or raises ValueError or OSError; workers get it by its name.
    """
    from torch.utils.data import DataLoader

    loader = DataLoader(
        Pictures(pictures, open_picture, scorer.preprocess),
        batch_size=batch_size,
        num_workers=min(num_workers, -(-len(pictures) // batch_size)),
        collate_fn=collate,
        pin_memory=scorer.device.type == "cuda",
    )
    with tqdm(total=len(pictures), desc="score", unit="image", disable=not show) as bar:
        for pixels, reasons in loader:
            features = () if pixels is None else scorer.encode_images(pixels)
            bar.update(len(reasons))
            yield features, reasons


class Pictures:
    """A torch dataset of (pixels, None), or (None, why the picture cannot be decoded)."""

    def __init__(self, pictures: list, open_picture: Callable, preprocess: Callable):
        self.pictures, self.open_picture, self.preprocess = pictures, open_picture, preprocess

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        try:
            return self.preprocess(self.open_picture(self.pictures[i])), None
        except (ValueError, OSError) as error:
            return None, str(error)


def collate(items):
    """Return the stacked pixels of a batch's good pictures, and for each picture the reason why it is none, or None."""
    import torch

    good = [pixels for pixels, _ in items if pixels is not None]
    return torch.stack(good) if good else None, [reason for _, reason in items]
