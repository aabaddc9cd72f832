"""Measure how often a preference model agrees with people: its accuracy on the choices of a test split.

    python evaluate_preference.py --hpc hpc.pth --dataset_folder dataset
    python evaluate_preference.py --hpc hpc.pth other.pth --output preference.jsonl          # side by side, paired
    python evaluate_preference.py --data_file HPD/test.json --hpc HPS_v2.pt --model ViT-H-14 --resize pad
    python evaluate_preference.py                                                            # plain CLIP, the baseline

Reads   DATASET_FOLDER/preference_test.json, or --data_file: the released files of HPD, HPD v2, ImageReward and Pick-a-Pic
        (utils/preferences.py says where their pictures are looked for; --image_folder says it otherwise)
        HPC: one or more classifiers (train_hpc.py, the released one, HPS v2); without it, plain CLIP (--pretrained)
Writes  --output, if given: a row per prompt with every model's scores, with OUTPUT.run.json (the numbers of the table) and
        OUTPUT.errors.jsonl (prompts with a broken picture) beside it; OUTPUT.parts/ is what a rerun goes on with, and what
        several processes (accelerate launch, torchrun, SLURM, --rank and --world_size) put together

Prints  top-1: how often the highest score is the image that people chose, next to chance, which is the mean of 1/n over
        prompts of n images; pairwise: how often of two images the one that people preferred scores higher (chance 50 %);
        each with its 95 % interval, the percentiles over resampled prompts; differences are paired.
"""

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from utils import jsonl, preferences, ranks, runs
from utils.errors import UserError, one_line_errors


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hpc", nargs="+", default=[], help="classifiers to compare, the first one with the others")
    parser.add_argument(
        "--dataset_folder", default="dataset", help="its preference_test.json is read (default: dataset)"
    )
    parser.add_argument("--data_file", nargs="+", help="instead: files of any of the formats")
    parser.add_argument("--image_folder", help="where the pictures of --data_file lie")
    parser.add_argument("--output", help="write a row per prompt here, and go on there after an interruption")
    parser.add_argument("--overwrite", action="store_true", help="replace an output made with other options")
    # Model.
    parser.add_argument(
        "--model", nargs="+", default=[None],
        help="open_clip name or JSON config, one for all or one for each (default: the checkpoint's, else ViT-L/14)",
    )  # fmt: skip
    parser.add_argument("--pretrained", help='weights of plain CLIP, compared too (default without --hpc: "openai")')
    parser.add_argument(
        "--resize", nargs="+", choices=["crop", "pad"], default=[None],
        help="one for all or one for each (default: the checkpoint's, else crop, CLIP's own)",
    )  # fmt: skip
    parser.add_argument("--precision", choices=["fp32", "fp16"], default="fp32", help="default: fp32")
    # Intervals.
    parser.add_argument("--resamples", type=int, default=2000, help="of the prompts (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling")
    # Machinery.
    parser.add_argument("--batch_size", type=int, default=64, help="pictures (default: 64)")
    parser.add_argument("--num_workers", type=int, default=4, help="processes that decode pictures (default: 4)")
    parser.add_argument("--device", help="default: the GPU if there is one, else the CPU")
    ranks.add_arguments(parser)
    return parser.parse_args(argv)


def main(args):
    rank, world_size = ranks.rank_and_world_size(args)
    if args.batch_size < 1 or args.num_workers < 0 or args.resamples < 1:
        raise UserError("--batch_size and --resamples should be 1 or more, --num_workers 0 or more")
    if world_size > 1 and not args.output:
        raise UserError("several processes put their scores together in a file: give --output")

    # Read the choices, and find the scores that are there already.
    files = args.data_file or [Path(args.dataset_folder) / "preference_test.json"]
    dropped = []
    choices = [choice for file in files for choice in preferences.read(file, dropped, args.image_folder)]
    models = list_models(args)
    record, appender, found = begin_output(args, files, models, rank)

    # Score what is left of this process's share, model by model.
    with appender or nullcontext():
        for number, model in enumerate(models):
            todo = [i for i in range(rank, len(choices), world_size) if (number, i) not in found]
            for i, (scores, reason) in zip(
                todo, score(model, [choices[i] for i in todo], args, rank == 0), strict=True
            ):
                found[number, i] = (scores and [round(value, 6) for value in scores], reason)
                if appender:
                    row = {"model": number, "index": i, "scores": found[number, i][0], "reason": reason}
                    appender.write(row)

    # The process that finds everything there puts it together.
    if args.output:
        found = read_parts(args)
    if len(found) < len(models) * len(choices):
        print(f"rank {rank} of {world_size} has scored its share; {args.output} is written when the others' is there")
        return
    broken = {i: reason for (_, i), (_, reason) in sorted(found.items()) if reason}
    dropped += [{"item": choices[i].where, "stage": "decode", "reason": reason} for i, reason in broken.items()]
    kept = [i for i in range(len(choices)) if i not in broken]
    if not kept:
        raise UserError(f"{files[0]}: no usable prompts in it; the first one: {choices[0].where}: {broken[0]}")
    labels = [model["label"] for model in models]
    scores = [[found[number, i][0] for i in kept] for number in range(len(models))]
    choices = [choices[i] for i in kept]
    counts = [
        np.array([preferences.agreement(s, choice) for s, choice in zip(model, choices, strict=True)])
        for model in scores
    ]
    results = measure(choices, counts, args)

    # Report.
    images = sum(len(choice.images) for choice in choices)
    if args.output:
        jsonl.write_whole(args.output, "".join(jsonl.dumps(row) for row in make_rows(choices, labels, scores, counts)))
        jsonl.write_whole(f"{args.output}.errors.jsonl", "".join(map(jsonl.dumps, dropped)))
        totals = {"prompts": len(choices), "images": images, "dropped_prompts": len(dropped)}
        runs.finish(f"{args.output}.run.json", record, **totals, results={"models": labels, **results})
    print(f"{', '.join(map(str, files))}: {len(choices)} prompts, {images} images")
    print_table(results, labels)
    if dropped:
        where = (
            f"see {args.output}.errors.jsonl"
            if args.output
            else f"the first: {dropped[0]['item']}: {dropped[0]['reason']}"
        )
        print(f"dropped {len(dropped)} prompts, {where}")


def list_models(args) -> list[dict]:
    """Return the models to compare: a label for the table, and what `hps.load` takes."""
    given = [{"checkpoint": path} for path in args.hpc]
    if args.pretrained or not given:
        given.append({"pretrained": args.pretrained or "openai"})
    for option in ("model", "resize"):
        values = getattr(args, option)
        if len(values) not in (1, len(given)):
            raise UserError(f"--{option}: give one for all, or one for each of the {len(given)} models")
        for model, value in zip(given, values * len(given) if len(values) == 1 else values, strict=True):
            model[option] = value
    names = [Path(model.get("checkpoint") or model["pretrained"]).name for model in given]
    for model, name in zip(given, names, strict=True):
        model["label"] = name if names.count(name) == 1 else str(model.get("checkpoint") or model["pretrained"])
    if len({model["label"] for model in given}) < len(given):
        raise UserError("--hpc: the same classifier twice")
    return given


def score(model: dict, choices: list, args, show: bool) -> Iterator[tuple]:
    """Yield what `preferences.score` does for a model, loaded only if there is something to score."""
    if not choices:
        return
    from utils import hps  # takes seconds

    options = {key: value for key, value in model.items() if key != "label"}
    scorer = hps.load(**options, device=ranks.device(args.device), precision=args.precision)
    yield from preferences.score(choices, scorer, args.batch_size, args.num_workers, show)


# --- what is on disk ---


def begin_output(args, files: list, models: list[dict], rank: int) -> tuple[dict | None, jsonl.Appender | None, dict]:
    """Return the run's record, where this process's scores go, and the scores that are there already."""
    if not args.output:
        return None, None, {}
    settings = {
        "data_sha256": [runs.sha256(file) for file in files],
        "image_folder": args.image_folder and str(Path(args.image_folder).resolve()),
        "models": [
            model | ({"checkpoint": runs.sha256(model["checkpoint"])} if "checkpoint" in model else {})
            for model in models
        ],
        "precision": args.precision,
    }
    output, parts = Path(args.output), Path(f"{args.output}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    record_path = f"{output}.run.json"
    try:
        record = runs.begin(record_path, settings)
    except UserError:
        if not args.overwrite:
            raise
        # Whichever rank comes first clears for all; the others then find their own settings.
        for path in (output, *parts.glob("*.jsonl")):
            path.unlink(missing_ok=True)
        record = runs.begin(record_path, settings, overwrite=True)
    appender = jsonl.Appender(parts / f"rank-{rank}.jsonl")  # before reading: it cuts a torn last line
    # What could not be read is tried again.
    return record, appender, {key: value for key, value in read_parts(args).items() if value[1] is None}


def read_parts(args) -> dict[tuple[int, int], tuple]:
    """Return {(model, choice): (scores, reason)} from what all processes have written so far."""
    found = {}
    for path in sorted(Path(f"{args.output}.parts").glob("rank-*.jsonl")):
        for row in jsonl.read(path, {"model": int, "index": int}):
            key = row["model"], row["index"]
            if row["reason"] is None or key not in found:
                found[key] = (row["scores"], row["reason"])
    return found


def make_rows(choices, labels, scores, counts) -> Iterator[dict]:
    """Yield the output's rows."""
    for i, choice in enumerate(choices):
        by_model = {
            "scores": [model[i] for model in scores],
            "top1": [round(float(model[i, 0]), 4) for model in counts],
        }
        yield {
            "item": choice.where,
            "prompt": choice.prompt,
            "images": [str(image if isinstance(image, Path) else image.name) for image in choice.images],
            "ranks": choice.ranks,
            **{key: dict(zip(labels, values, strict=True)) for key, values in by_model.items()},
        }


# --- numbers ---


def measure(choices, counts: list[np.ndarray], args) -> dict[str, list[dict]]:
    """Return {"top1": rows, "pairwise": rows}: per subset of the prompts n, chance, and [value, low, high] of every model and
    of every model's difference from the first."""
    sizes = np.array([len(choice.images) for choice in choices])
    names = np.array([choice.contain_name for choice in choices], dtype=object)
    subsets = {"all": np.full(len(choices), True)}
    if len(set(sizes)) > 1:
        subsets |= {f"{n} images": sizes == n for n in sorted(set(sizes))}
    for value, label in ((True, "prompts with names"), (False, "prompts without names")):
        if any(names == value):
            subsets[label] = names == value

    # The same prompt may come several times: it is the prompts that are resampled.
    prompts = np.array([choice.prompt for choice in choices])
    results = {"top1": [], "pairwise": []}
    for subset, chosen in subsets.items():
        _, groups = np.unique(prompts[chosen], return_inverse=True)
        ones = np.ones(chosen.sum())
        for measured, right, of, chance in (
            ("top1", 0, None, float((1 / sizes[chosen]).mean())),
            ("pairwise", 1, 2, 0.5),
        ):
            rights = [np.bincount(groups, model[chosen, right]) for model in counts]
            total = np.bincount(groups, ones if of is None else counts[0][chosen, of])
            if not total.sum():
                continue
            values = bootstrap(rights, total, args.resamples, args.seed)
            row = {"subset": subset, "n": int(total.sum()), "chance": chance, "models": values["ratios"]}
            results[measured].append(row | {"minus_first": values["differences"]})
    return results


def bootstrap(rights: list[np.ndarray], total: np.ndarray, resamples: int, seed: int) -> dict[str, list]:
    """Return sum(right) / sum(total) of every model and their differences from the first, each as [value, low, high].

    `rights` and `total` are sums over each prompt; the interval is from the 2.5 % to the 97.5 % percentile over resamples
    of the prompts, the same ones for every model.
    """
    rng, n = np.random.default_rng(seed), len(total)
    drawn = []
    for _ in range(resamples):
        times = np.bincount(rng.integers(n, size=n), minlength=n)
        drawn.append([right @ times / max(total @ times, 1e-9) for right in rights])
    drawn, value = np.array(drawn), np.array([right.sum() / total.sum() for right in rights])

    def interval(value, samples):
        return [float(value), *np.percentile(samples, [2.5, 97.5]).tolist()]

    return {
        "ratios": [interval(value[k], drawn[:, k]) for k in range(len(rights))],
        "differences": [interval(value[k] - value[0], drawn[:, k] - drawn[:, 0]) for k in range(1, len(rights))],
    }


def print_table(results: dict, labels: list[str]):
    """Print a block for each measure: a row a subset, a column a model, then the models' differences from the first."""
    letters = [chr(ord("A") + k) for k in range(len(labels))]
    print("\n" + "\n".join(f"{letter}  {label}" for letter, label in zip(letters, labels, strict=True)))
    heads = [*letters, *(f"{letter} - A" for letter in letters[1:])]
    for measured, title, unit in (("top1", "top-1 accuracy", "prompts"), ("pairwise", "pairwise accuracy", "pairs")):
        print(f"\n{title:24s}{unit:>8s}{'chance':>8s}  {''.join(f'{head:26s}' for head in heads)}".rstrip())
        for row in results[measured]:
            cells = ["{:.1f} % ({:.1f} to {:.1f})".format(*(100 * x for x in cell)) for cell in row["models"]]
            cells += ["{:+.1f} % ({:+.1f} to {:+.1f})".format(*(100 * x for x in cell)) for cell in row["minus_first"]]
            shown = "".join(f"{cell:26s}" for cell in cells)
            print(f"{row['subset']:24s}{row['n']:8d}{100 * row['chance']:6.1f} %  {shown}".rstrip())


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
