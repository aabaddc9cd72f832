"""Score generated pictures with the Human Preference Score (HPS), and print the mean.

    python evaluate_hps.py --hpc hpc.pth --image_folder output --meta_file output/meta.json

Reads   HPC: the classifier (train_hpc.py, or the released one; HPS v2 with --model ViT-H-14 --resize pad)
        META_FILE: a JSON array or JSON Lines of file_name (or file_path) and caption (or prompt), as generate_images.py
        writes it; the files lie in IMAGE_FOLDER
Writes  --output, if given: a row per picture of file_name, caption and score (100 * cosine), with OUTPUT.run.json beside
        it; a rerun scores only what is not there yet
        with --skip_errors: OUTPUT.errors.jsonl (or META_FILE.errors.jsonl), a row per picture that cannot be decoded

Prints the mean of the raw cosine, as the original did and the paper's tables have it, then n and the standard error:

    HPS: 0.189812
    n: 2000, standard error: 0.000291
"""

import argparse
import os
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils import jsonl, ranks, runs
from utils.errors import UserError, one_line_errors
from utils.images import open_image


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hpc", required=True, help="the classifier's checkpoint")
    parser.add_argument("--image_folder", required=True, help="folder of the pictures")
    parser.add_argument("--meta_file", required=True, help="JSON array or JSON Lines of file_name and caption")
    parser.add_argument("--output", help="write a row per picture here, and go on there after an interruption")
    parser.add_argument("--skip_errors", action="store_true", help="pass over pictures that cannot be decoded")
    parser.add_argument("--overwrite", action="store_true", help="replace an output made with other options")
    # Model.
    parser.add_argument("--model", help="open_clip name or JSON config (default: the checkpoint's, else ViT-L/14)")
    parser.add_argument("--resize", choices=["crop", "pad"], help="default: the checkpoint's, else crop, CLIP's own")
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp32", help="default: fp32")
    # Machinery.
    parser.add_argument("--batch_size", type=int, default=16, help="pictures; scores do not depend on it (default: 16)")
    parser.add_argument("--num_workers", type=int, default=4, help="processes that decode pictures (default: 4)")
    parser.add_argument("--device", help="default: the GPU if there is one, else the CPU")
    return parser.parse_args(argv)


def main(args):
    if args.batch_size < 1 or args.num_workers < 0:
        raise UserError("--batch_size should be 1 or more, --num_workers 0 or more")

    # Read what to score; one picture may come with several captions.
    folder = Path(args.image_folder)
    pairs = read_pairs(args.meta_file, folder)

    from utils import hps  # takes seconds: --help and mistakes in the meta file do not wait for it

    # Load the classifier, and find the scores that are there already.
    scorer = hps.load(args.hpc, args.model, ranks.device(args.device), precision=args.precision, resize=args.resize)
    settings = {
        "checkpoint_sha256": runs.sha256(args.hpc),
        "model": scorer.config,
        "resize": scorer.resize,
        "precision": args.precision,
        "image_folder": str(folder.resolve()),
    }
    record, output, scores = begin_output(args, settings, folder)
    errors_path = f"{args.output or args.meta_file}.errors.jsonl"
    Path(errors_path).unlink(missing_ok=True)  # a rerun tries again what was skipped

    # Score the rest; each distinct prompt is encoded once.
    todo = [pair for pair in dict.fromkeys(pairs) if pair not in scores]
    skipped = 0
    with output or nullcontext(), closing(score_pairs(scorer, folder, todo, args)) as scored:
        for (file_name, caption), score, reason in scored:
            if reason is None:
                scores[file_name, caption] = score
                if output:
                    output.write({"file_name": file_name, "caption": caption, "score": score})
            elif args.skip_errors:
                skipped += 1
                with jsonl.Appender(errors_path) as errors:
                    errors.write({"item": file_name, "stage": "decode", "reason": reason})
            else:
                raise UserError(f"{folder / file_name}: {reason} (--skip_errors passes over it)")

    # Report the mean of the cosine over the rows of the meta file.
    cosines = np.array([scores[pair] / 100 for pair in pairs if pair in scores])
    if not len(cosines):
        raise UserError(f"{args.meta_file}: none of the {len(pairs)} pictures can be decoded, see {errors_path}")
    n, mean = len(cosines), cosines.mean()
    standard_error = cosines.std(ddof=1) / n**0.5 if n > 1 else float("nan")
    if output:
        results = {"n": n, "skipped": skipped, "hps": mean, "standard_error": standard_error}
        runs.finish(f"{args.output}.run.json", record, **results)
    print(f"HPS: {mean:.6f}")
    print(
        f"n: {n}, standard error: {standard_error:.6f}"
        + (f", skipped: {skipped}, see {errors_path}" if skipped else "")
    )


def read_pairs(meta_file: str, folder: Path) -> list[tuple[str, str]]:
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


def begin_output(args, settings: dict, folder: Path) -> tuple[dict | None, jsonl.Appender | None, dict]:
    """Return the run's record, the output to append to, and {(file name, caption): score} of what is there already."""
    if not args.output:
        return None, None, {}
    output, record_path = Path(args.output), Path(f"{args.output}.run.json")
    if args.overwrite:
        output.unlink(missing_ok=True)
    elif output.exists() and not record_path.exists():
        raise UserError(f"{output}: there is no {record_path.name} of its making; use --overwrite or another place")
    output.parent.mkdir(parents=True, exist_ok=True)
    record = runs.begin(record_path, settings, args.overwrite)
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


def score_pairs(scorer, folder: Path, pairs: list[tuple[str, str]], args):
    """Yield (pair, score, None), or (pair, None, reason) if its picture cannot be decoded, in the order of the pairs."""
    import torch
    from torch.utils.data import DataLoader

    from utils.hps import pair_scores

    if not pairs:
        return
    captions = list(dict.fromkeys(caption for _, caption in pairs))
    encoded = dict(zip(captions, scorer.encode_prompts(captions), strict=True))
    loader = DataLoader(
        Pictures([folder / file_name for file_name, _ in pairs], scorer.preprocess),
        batch_size=args.batch_size,
        num_workers=min(args.num_workers, -(-len(pairs) // args.batch_size)),
        collate_fn=collate,
        pin_memory=scorer.device.type == "cuda",
    )
    rest = iter(pairs)
    with tqdm(total=len(pairs), desc="evaluate_hps", unit="image") as bar:
        for pixels, reasons in loader:
            batch = [next(rest) for _ in reasons]
            good = [caption for (_, caption), reason in zip(batch, reasons, strict=True) if reason is None]
            scores = torch.zeros(0)
            if good:
                texts = torch.stack([encoded[caption] for caption in good])
                scores = pair_scores(scorer.encode_images(pixels), texts)
            if not scores.isfinite().all():
                raise UserError(f"{args.hpc}: gives scores that are no numbers; is it sound, and --precision enough?")
            values = iter(scores.tolist())
            for pair, reason in zip(batch, reasons, strict=True):
                yield pair, round(next(values), 6) if reason is None else None, reason
            bar.update(len(batch))


class Pictures:
    """A torch dataset of (pixels, None), or (None, why the picture cannot be decoded)."""

    def __init__(self, paths: list[Path], preprocess):
        self.paths, self.preprocess = paths, preprocess

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            return self.preprocess(open_image(self.paths[i])), None
        except (ValueError, OSError) as error:
            return None, str(error)


def collate(items):
    """Return the stacked pixels of a batch's good pictures, and for each picture the reason why it is none, or None."""
    import torch

    good = [pixels for pixels, _ in items if pixels is not None]
    return torch.stack(good) if good else None, [reason for _, reason in items]


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
