"""Compare the pictures of two or more models: a table, a page to look at, a figure, a blind vote.

    python compare_models.py --hpc hpc.pth --baseline images/base --candidate images/adapted --output report
    python compare_models.py ... --scores aesthetic_base.jsonl aesthetic_adapted.jsonl       # another score, in place of HPS or beside it
    python compare_models.py ... --vote                                                      # the blind vote, on http://127.0.0.1:8000
    python compare_models.py ... --figure_prompts "a red circle" "a blue square"             # what the figure shows

Reads   FOLDER/meta.json and the pictures of each folder, as generate_images.py writes them. Pictures are paired by prompt and
        file name, what is left of a prompt in its order; what finds no partner in every other folder is named and left out
        --hpc: the classifier, for the Human Preference Score; scored as by evaluate_hps.py, and a rerun scores only what is new
        --scores: JSON Lines of file_name, caption and score, as evaluate_hps.py --output writes, a file a folder
Writes  OUTPUT/index.html (opens from disk; with OUTPUT/pictures/ it can be sent to anybody), OUTPUT/figure.png,
        OUTPUT/summary.json, OUTPUT/scores/ (a row a picture), OUTPUT/votes.jsonl (of --vote),
        OUTPUT/report.errors.jsonl (what was left out), OUTPUT/report.run.json (a report of other folders is refused)

Every prompt counts once: several pictures of one prompt are averaged first. A tie is half a win. The difference's interval is
bootstrapped over prompts, p is the two-sided sign test's, "spread" is the standard deviation of the prompts' differences.
"""

import argparse
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np

from utils import jsonl, ranks, runs, scoring
from utils.errors import UserError, one_line_errors

PAGE = Path(__file__).parent / "utils" / "report.html"
DATA = '<script id="data" type="application/json">{}</script>'
NAMED = 5  # so many left out are named on the screen, all of them in report.errors.jsonl


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, required=True, help="folder of the model to compare with")
    parser.add_argument(
        "--candidate", type=Path, required=True, action="append", help="folder of a model; again for more"
    )
    parser.add_argument("--output", type=Path, default=Path("report"), help="folder of the report (default: report)")
    parser.add_argument("--labels", nargs="+", help="names of the models, the baseline's first (default: the folders')")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a report of other folders, and score anew; votes are kept"
    )
    # Scores.
    parser.add_argument("--hpc", help="the classifier's checkpoint")
    parser.add_argument(
        "--scores", nargs="+", action="append", default=[], metavar="FILE", help="a file a folder, the baseline's first"
    )
    parser.add_argument("--score_names", nargs="+", default=[], help="what the scores of --scores are called")
    parser.add_argument("--tie", type=float, default=0.0, help="differences up to this are ties (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap, and of the vote's sides (default: 0)")
    scoring.add_arguments(parser)
    # The figure, the vote.
    parser.add_argument(
        "--figure_prompts", nargs="+", help="prompts, or parts that only one has (default: six, from worst to best)"
    )
    parser.add_argument("--vote", action="store_true", help="ask people, in the browser, which picture is better")
    parser.add_argument("--port", type=int, default=8000, help="of the vote; 0 for any that is free (default: 8000)")
    return parser.parse_args(argv)


def main(args):
    scoring.check_arguments(args)

    # Find what there is to compare.
    folders = [args.baseline, *args.candidate]
    labels = name_models(args.labels, folders)
    metas = [scoring.read_pairs(folder / "meta.json", folder) for folder in folders]
    pairs, left_out = pair_pictures(folders, metas)
    sets = find_scores(args, folders)
    begin_report(args, folders)

    # Score it.
    if args.hpc:
        score_folders(args, folders, metas, sets["HPS"])
    scores = {name: [read_score(path) for path in paths] for name, paths in sets.items()}
    pairs, unscored = keep_scored(folders, pairs, scores)
    tell_left_out(args.output, left_out + unscored)
    if not pairs:
        raise UserError(f"{args.output}: no picture has a partner in every folder")
    values = {
        name: np.array([[t[m][key] for m, key in enumerate(keys(p))] for p in pairs]) for name, t in scores.items()
    }

    # Tell what comes of it.
    prompts = group([pair[0] for pair in pairs])
    summary = {
        "labels": labels,
        "seed": args.seed,
        "prompts": int(prompts.max()) + 1,
        "pairs": len(pairs),
        "left_out": len(left_out) + len(unscored),
        "scores": [compare(name, table, prompts, args) for name, table in values.items()],
    }
    pictures = link_pictures(args.output, folders, pairs)
    items = vote_items(args.output, labels, pairs, pictures)
    write_report(args, summary, pairs, values, pictures, items)
    print_report(args, summary)
    if args.vote:
        hold_vote(args, labels[0], items)
        write_report(args, summary, pairs, values, pictures, items)
        print_votes(summary["votes"])


# --- what is compared ---


def name_models(given: list[str] | None, folders: list[Path]) -> list[str]:
    """Return a name for each folder: the given ones, else as much of the paths' ends as tells them apart."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("--candidate: a folder is compared with itself")
    names = given
    for depth in range(1, 10):
        if not given:
            names = ["/".join(folder.resolve().parts[-depth:]) for folder in folders]
        if len(set(names)) == len(folders) == len(names):
            return names
    raise UserError(f"--labels: expected {len(folders)} different names, the baseline's first")


def pair_pictures(folders: list[Path], metas: list[list[tuple[str, str]]]) -> tuple[list[tuple], list[dict]]:
    """Return [(caption, file names in the order of the folders)], in the baseline's order, and what found no partners."""
    errors, pools = [], []
    for folder, meta in zip(folders, metas, strict=True):
        pool = {}
        for file_name, caption in dict.fromkeys(meta):
            if (folder / file_name).is_file():
                pool[file_name, caption] = Path(file_name).with_suffix("").as_posix()
            else:
                errors.append({"item": str(folder / file_name), "stage": "pair", "reason": "no such file"})
        pools.append(pool)
    found = {}
    # Under the same name first; then, in its order, what is left of each prompt.
    for by_name in (True, False):
        keyed = []
        for pool in pools:
            seen, table = {}, {}
            for (file_name, caption), stem in pool.items():
                seen[caption] = seen.get(caption, -1) + 1
                table.setdefault((caption, stem if by_name else seen[caption]), file_name)
            keyed.append(table)
        for key in keyed[0]:
            if all(key in table for table in keyed):
                files = [table[key] for table in keyed]
                found[files[0], key[0]] = (key[0], files)
                for pool, file_name in zip(pools, files, strict=True):
                    del pool[file_name, key[0]]
    for folder, pool in zip(folders, pools, strict=True):
        for file_name, caption in pool:
            reason = f"no partner of the prompt {caption!r} in every other folder"
            errors.append({"item": str(folder / file_name), "stage": "pair", "reason": reason})
    return [found[row] for row in dict.fromkeys(metas[0]) if row in found], errors


def begin_report(args, folders: list[Path]):
    """Make or find the report's folder; UserError if it holds something else."""
    record = args.output / "report.run.json"
    args.output.mkdir(parents=True, exist_ok=True)
    # Old pictures of a report are removed: nobody else's may be.
    if not record.exists() and any(path.name[0] != "." for path in args.output.iterdir()):
        raise UserError(f"{args.output}: holds other things than a report; use another place")
    settings = {"baseline": str(folders[0].resolve()), "candidates": [str(f.resolve()) for f in folders[1:]]}
    runs.begin(record, settings, args.overwrite)
    (args.output / "scores").mkdir(exist_ok=True)


def tell_left_out(output: Path, errors: list[dict]):
    """Name what is left out: the first on the screen, all of it in report.errors.jsonl."""
    path = output / "report.errors.jsonl"
    jsonl.write_whole(path, "".join(map(jsonl.dumps, errors)))
    for error in errors[:NAMED]:
        print(f"left out: {error['item']}: {error['reason']}", file=sys.stderr)
    if errors:
        print(f"left out: {len(errors)} pictures, see {path}", file=sys.stderr)


# --- scores ---


def find_scores(args, folders: list[Path]) -> dict[str, list]:
    """Return {score's name: a file a folder}; those of HPS may still have to be written."""
    if args.tie < 0:
        raise UserError(f"--tie {args.tie}: should be 0 or more")
    files = [file for group in args.scores for file in group]
    if len(files) % len(folders):
        raise UserError(f"--scores: expected a file for each of the {len(folders)} folders, found {len(files)}")
    sets = [files[i : i + len(folders)] for i in range(0, len(files), len(folders))]
    names = args.score_names or ["score" if len(sets) == 1 else f"score {i + 1}" for i in range(len(sets))]
    if args.hpc:
        names = ["HPS", *names]
        sets.insert(
            0, [args.output / "scores" / f"{m}_{folder.resolve().name}.jsonl" for m, folder in enumerate(folders)]
        )
    elif not (sets or args.vote or (args.output / "votes.jsonl").exists()):
        raise UserError("nothing to compare by: give --hpc, --scores or --vote")
    if len(set(names)) != len(sets) or len(names) != len(sets):
        raise UserError(f"--score_names: {len(names)} names for {len(sets)} scores, or one of them twice")
    return dict(zip(names, sets, strict=True))


def score_folders(args, folders: list[Path], metas: list, outputs: list[Path]):
    """Score what has no score yet, as `evaluate_hps.py --output` does."""
    from utils import hps  # takes seconds

    scorer = hps.load(args.hpc, args.model, ranks.device(args.device), precision=args.precision, resize=args.resize)
    for folder, meta, output in zip(folders, metas, outputs, strict=True):
        scoring.score_folder(args, scorer, folder / "meta.json", folder, meta, output, skip_errors=True)


def read_score(path) -> dict[tuple[str, str], float]:
    found = {}
    rows = jsonl.read(path, {"file_name": str, "caption": str, "score": (int, float)})
    for number, row in enumerate(rows, 1):
        if not np.isfinite(row["score"]):
            raise UserError(f"{path}: row {number}: field 'score' should be finite, found {row['score']}")
        found[row["file_name"], row["caption"]] = float(row["score"])
    return found


def keep_scored(folders, pairs, scores) -> tuple[list[tuple], list[dict]]:
    """Return the pairs whose pictures have every score, and what the others lack."""
    kept, errors = [], []
    for pair in pairs:
        lacking = [
            {"item": str(folders[m] / key[0]), "stage": "score", "reason": f"no {name} of it (can it be decoded?)"}
            for name, tables in scores.items()
            for m, key in enumerate(keys(pair))
            if key not in tables[m]
        ]
        errors += lacking
        kept += [] if lacking else [pair]
    return kept, errors


def keys(pair) -> list[tuple[str, str]]:
    caption, files = pair
    return [(file_name, caption) for file_name in files]


# --- statistics ---


def group(captions: list[str]) -> np.ndarray:
    """Return the number of each caption among the distinct ones, in the order of their first appearance."""
    numbers = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    return np.array([numbers[caption] for caption in captions])


def compare(name: str, values: np.ndarray, prompts: np.ndarray, args) -> dict:
    """Return a score's comparison: a row a model, and the matrix of win rates (row over column).

    `values` (pairs, models) are the scores, `prompts` (pairs,) says which pairs share a prompt. Model 0 is the baseline.
    """
    means = np.stack([np.bincount(prompts, column) / np.bincount(prompts) for column in values.T], 1)
    rows = [{"mean": float(means[:, 0].mean())}]
    for m in range(1, means.shape[1]):
        rows.append({"mean": float(means[:, m].mean()), **statistics(means[:, m] - means[:, 0], args.seed, args.tie)})
    differences = means[:, :, None] - means[:, None, :]
    matrix = (differences > args.tie).mean(0) + (np.abs(differences) <= args.tie).mean(0) / 2
    return {"name": name, "rows": rows, "matrix": matrix.tolist()}


def statistics(differences: np.ndarray, seed: int = 0, tie: float = 0.0) -> dict:
    """Return what paired differences (n,) say: mean, 95 % bootstrap interval, wins, ties, losses, sign test, spread."""
    from scipy import stats

    n = len(differences)
    wins, losses = int((differences > tie).sum()), int((differences < -tie).sum())
    interval, spread = None, None
    if n > 1:
        found = stats.bootstrap(
            (differences,), np.mean, batch=500, method="percentile", rng=np.random.default_rng(seed)
        ).confidence_interval
        interval, spread = [float(found.low), float(found.high)], float(differences.std(ddof=1))
    return {
        "difference": float(differences.mean()),
        "interval": interval,
        "wins": wins,
        "ties": n - wins - losses,
        "losses": losses,
        "win_rate": (wins + (n - wins - losses) / 2) / n,
        "p": float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0,
        "spread": spread,
    }


# --- what is written ---


def link_pictures(output: Path, folders: list[Path], pairs: list[tuple]) -> list[list[str]]:
    """Put the pictures into the report, as hard links where the file system allows; return their paths in it."""
    shutil.rmtree(output / "pictures", ignore_errors=True)
    names = []
    for i, (_, files) in enumerate(pairs):
        names.append([f"pictures/{m}/{i}{Path(file_name).suffix.lower()}" for m, file_name in enumerate(files)])
        for folder, file_name, name in zip(folders, files, names[-1], strict=True):
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link((folder / file_name).resolve(), output / name)
            except OSError:
                shutil.copyfile(folder / file_name, output / name)
    return names


def vote_items(output: Path, labels: list[str], pairs: list[tuple], pictures: list[list[str]]) -> list:
    """Return what is voted on: each candidate's picture against the baseline's."""
    from utils.votes import Item, item_id

    items = []
    for (caption, _), names in zip(pairs, pictures, strict=True):
        base, *others = [output / name for name in names]
        items += [
            Item(item_id(base, other), caption, label, (base, other))
            for label, other in zip(labels[1:], others, strict=True)
        ]
    return items


def write_report(args, summary: dict, pairs, values: dict, pictures, items):
    """Write the figure, the page and the summary; the votes so far are read anew into the summary."""
    from utils import figure, votes

    found = votes.read(args.output / "votes.jsonl")
    summary["votes"] = votes.tally(found, items, summary["labels"][0]) if found else None
    chosen = choose_prompts(args.figure_prompts, pairs, values)
    captions, paths = [pairs[i][0] for i in chosen], [[args.output / name for name in pictures[i]] for i in chosen]
    figure.draw(args.output / "figure.png", summary["labels"], captions, paths)
    rows = [
        {"caption": caption, "pictures": names, "values": [np.round(table[i], 6).tolist() for table in values.values()]}
        for i, ((caption, _), names) in enumerate(zip(pairs, pictures, strict=True))
    ]
    jsonl.write_whole(args.output / "index.html", fill_page({**summary, "pairs": rows}))
    jsonl.write_whole(args.output / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def fill_page(data: dict) -> str:
    """Return the page with its data in it, in which no prompt can end the script element."""
    content = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    page = PAGE.read_text(encoding="utf-8")
    return page.replace(DATA.format("null"), DATA.format(content), 1)


def choose_prompts(wanted: list[str] | None, pairs, values: dict) -> list[int]:
    """Return which pairs the figure shows: the wanted prompts, else six at even ranks of the first score's difference."""
    if not wanted:
        ranked = range(len(pairs))
        if values:
            first = next(iter(values.values()))
            ranked = np.argsort(first[:, 1] - first[:, 0], kind="stable")
        return [int(ranked[i]) for i in sorted({round(x) for x in np.linspace(0, len(pairs) - 1, 6)})]
    chosen = []
    for text in wanted:
        exact = [i for i, (caption, _) in enumerate(pairs) if caption == text]
        partly = [i for i, (caption, _) in enumerate(pairs) if text in caption]
        found = len({pairs[i][0] for i in partly})
        if not exact and found != 1:
            raise UserError(f"--figure_prompts: {text!r} is part of {found} prompts, and none is exactly that")
        chosen.append((exact or partly)[0])
    return chosen


# --- what is printed, and the vote ---


def print_report(args, summary: dict):
    width = max(map(len, summary["labels"]))
    print(f"{summary['prompts']} prompts, {summary['pairs']} pairs, {summary['left_out']} pictures left out")
    for score in summary["scores"]:
        print(
            f"\n{score['name']:{width}}      mean  difference  95 % interval        win  tie loss  win rate  sign test  spread"
        )
        for label, row in zip(summary["labels"], score["rows"], strict=True):
            line = f"{label:{width}}  {row['mean']:8.3f}"
            if "difference" in row:
                interval = "[{:+.3f}, {:+.3f}]".format(*row["interval"]) if row["interval"] else "-"
                spread = "-" if row["spread"] is None else f"{row['spread']:.3f}"
                line += f"  {row['difference']:+10.3f}  {interval:19} {row['wins']:4} {row['ties']:4} {row['losses']:4}"
                line += f"  {row['win_rate']:7.1%}  {row['p']:9.2g}  {spread:>6}"
            print(line)
        if len(summary["labels"]) > 2:
            print(f"\n{score['name']}: how often the row wins over the column")
            print(" " * width + "".join(f"  {label:>8}" for label in summary["labels"]))
            for i, label in enumerate(summary["labels"]):
                rates = ("" if i == j else f"{rate:.1%}" for j, rate in enumerate(score["matrix"][i]))
                shown = (f"  {rate:>{max(8, len(name))}}" for rate, name in zip(rates, summary["labels"], strict=True))
                print(f"{label:{width}}" + "".join(shown))
    print_votes(summary["votes"])
    print(f"\n{args.output}/index.html shows the pairs, {args.output}/figure.png some of them")


def print_votes(votes: dict | None):
    if not votes:
        return
    voters = ", ".join(f"{voter['name']} ({voter['votes']})" for voter in votes["voters"])
    print(f"\nblind votes of {voters or 'nobody'}")
    for row in votes["rows"]:
        low, high = row["interval"]
        said = f"{row['label']} wins {row['win_rate']:.1%} [{low:.1%}, {high:.1%}] of {row['prompts']} prompts"
        said += f" ({row['wins']} wins, {row['ties']} ties, {row['losses']} losses)"
        if row["agreement"] is not None:
            alpha = "" if row["alpha"] is None else f", Krippendorff's alpha {row['alpha']:.2f}"
            said += f"; voters agree in {row['agreement']:.1%}{alpha}"
        print(said)
    if votes["foreign"]:
        print(f"{votes['foreign']} votes on other pictures do not count")


def hold_vote(args, baseline: str, items: list):
    """Serve the vote until Ctrl-C, or until the process is told to end."""
    from utils.votes import serve

    try:
        page = fill_page({"total": len(items)})
        server = serve(page, items, baseline, args.output / "votes.jsonl", args.seed, args.port)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {args.port}: {getattr(error, 'strerror', None) or error}") from None
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.default_int_handler)
    print(f"\nvote on http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        server.server_close()


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
