"""Ask the toy world's human what the demo was good for: the table, summary.json, picture.png and report.html.

    python -m toy.judge --output demo

Reads   OUTPUT/images/{base,base_negative,adapted,adapted_negative,...}/ of generate_images.py, OUTPUT/images/*.jsonl of
        evaluate_hps.py, OUTPUT/preference.jsonl of evaluate_preference.py, OUTPUT/seconds.tsv
Writes  OUTPUT/summary.json (means and standard errors of each row; paired: adapted with the negative prompt minus base
        without it, same prompts and seeds; the classifier beside a judge without noise), OUTPUT/picture.png (base above adapted), OUTPUT/report.html

This is the only place after make_data that calls `human_score`: the stages never do.
"""

import argparse
import base64
import html
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from toy import world
from utils.errors import UserError, one_line_errors
from utils.jsonl import read, write_whole

ROWS = {
    "base": "base",
    "base_negative": "base, negative prompt",
    "adapted": "adapted",
    "adapted_negative": "adapted, negative prompt",
    "regularization_only": "regularization only",
    "regularization_only_negative": "regularization only, negative prompt",
    "positives_only": "positives only",
    "positives_only_negative": "positives only, negative prompt",
    "published": "published recipe",
    "published_negative": "published recipe, negative prompt",
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="the demo's folder")
    parser.add_argument("--seed", type=int, default=0, help="written into the summary")
    parser.add_argument("--shown", type=int, default=14, help="pictures in a row of picture.png")
    return parser.parse_args(argv)


def main(args):
    # Score each row twice: by the human and by the classifier.
    human, hps = {}, {}
    for row in ROWS:
        folder = args.output / "images" / row
        if (folder / "meta.json").exists():
            shown = list(read(folder / "meta.json", {"file_name": str, "caption": str}))
            human[row] = np.array([world.human_score(Image.open(folder / r["file_name"]), r["caption"]) for r in shown])
            scores = {r["file_name"]: r["score"] for r in read(folder.with_suffix(".jsonl"), {"score": (int, float)})}
            hps[row] = np.array([scores[r["file_name"]] for r in shown])
    if not {"base", "base_negative", "adapted", "adapted_negative"} <= human.keys():
        raise UserError(f"{args.output}/images: the demo's four rows are not all there")

    # Sum up.
    summary = {row: {**sums("human", human[row]), **sums("hps", hps[row]), "n": len(human[row])} for row in human}
    for row in human:
        summary[row]["deformed"] = float((human[row] < world.DEFORMED_BELOW).mean())
    summary["paired"] = paired(human, hps, "adapted_negative", "base")
    summary["paired_negative_prompt"] = paired(human, hps, "adapted_negative", "adapted")
    summary["choices"] = judge_choices(args.output / "preference.jsonl")
    summary["classifier_accuracy"] = summary["choices"]["models"]["hpc.pth"]["accuracy"]
    summary["seed"] = args.seed
    summary["seconds"] = {}
    for line in (args.output / "seconds.tsv").read_text().splitlines():
        name, seconds = line.split("\t")
        summary["seconds"][name] = max(int(seconds), summary["seconds"].get(name, 0))
    write_whole(args.output / "summary.json", json.dumps(summary, indent=2) + "\n")

    # Show.
    draw_picture(args.output, args.shown).save(args.output / "picture.png")
    table = make_table(summary)
    print(table)
    write_whole(args.output / "report.html", make_report(table, (args.output / "picture.png").read_bytes()))
    print(f"\n{args.output}/picture.png shows the same prompts and seeds, base above adapted")


def judge_choices(path: Path) -> dict:
    """Return how often each model, and a judge who has the human's taste without the noise, picks what the human chose.

    `correlation` is that of a model's scores with the human's, both less their means within each prompt.
    """
    rows = list(read(path, {"prompt": str, "images": list, "ranks": list, "scores": dict, "top1": dict}))
    human = np.array([[world.human_score(Image.open(i), row["prompt"]) for i in row["images"]] for row in rows])
    chosen = np.array([row["ranks"] for row in rows]).argmin(1)
    accuracy = float((human.argmax(1) == chosen).mean())
    human -= human.mean(1, keepdims=True)
    models = {}
    for label in rows[0]["scores"]:
        scores = np.array([row["scores"][label] for row in rows])
        scores -= scores.mean(1, keepdims=True)
        models[label] = {
            "accuracy": float(np.mean([row["top1"][label] for row in rows])),
            "correlation": float(np.corrcoef(scores.ravel(), human.ravel())[0, 1]),
        }
    return {"prompts": len(rows), "chance": 1 / human.shape[1], "noise_free_accuracy": accuracy, "models": models}


def sums(name: str, values: np.ndarray) -> dict[str, float]:
    """Return the mean and its standard error."""
    return {f"{name}_mean": float(values.mean()), f"{name}_se": float(values.std(ddof=1) / len(values) ** 0.5)}


def paired(human: dict, hps: dict, a: str, b: str) -> dict[str, float]:
    """Return mean and standard error of the differences a minus b, picture by picture."""
    return {**sums("human", human[a] - human[b]), **sums("hps", hps[a] - hps[b])}


def make_table(summary: dict) -> str:
    """Return the table as lines of text, a row a model, and what the differences are worth."""
    lines = [f"{'':36} human score       HPS               deformed"]
    for row, name in ROWS.items():
        if row in summary:
            s = summary[row]
            scores = f"{s['human_mean']:.3f} ± {s['human_se']:.3f}    {s['hps_mean']:6.2f} ± {s['hps_se']:.2f}"
            lines.append(f"{name:36} {scores}     {s['deformed']:5.0%}")
    for key, name in (
        ("paired", "adapted with negative prompt minus base"),
        ("paired_negative_prompt", "what the negative prompt adds to adapted"),
    ):
        p = summary[key]
        lines.append(
            f"{name}: human {p['human_mean']:+.3f} ± {p['human_se']:.3f} ({p['human_mean'] / p['human_se']:.1f} standard errors), "
            f"HPS {p['hps_mean']:+.2f} ± {p['hps_se']:.2f} ({p['hps_mean'] / p['hps_se']:.1f})"
        )
    seconds = summary["seconds"]
    lines.append(f"{summary['base']['n']} pictures a row; {sum(seconds.values())} s in all")
    choices = summary["choices"]
    best = choices["noise_free_accuracy"]
    lines.append(
        f"\nthe human's choice among four in {choices['prompts']} test prompts (chance {choices['chance']:.0%}):"
    )
    lines.append(f"{'a judge without noise':36} {best:.1%}")
    for label, s in choices["models"].items():
        share = f"{s['accuracy'] / best:.0%} of that judge"
        lines.append(f"{label:36} {s['accuracy']:.1%}, {share}; correlation with the human {s['correlation']:.2f}")
    return "\n".join(lines)


def draw_picture(output: Path, shown: int) -> Image.Image:
    """Return two rows of pictures, base above adapted with the negative prompt, for the first prompts."""
    rows = ("base", "adapted_negative")
    images = [Image.open(output / "images" / row / f"{i}.jpg") for row in rows for i in range(shown)]
    sheet = world.contact_sheet(images, columns=shown, zoom=2)
    margin = 76
    picture = Image.new("RGB", (sheet.width + margin, sheet.height), "white")
    picture.paste(sheet, (margin, 0))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for i, name in enumerate(("base", "adapted")):
        pen.text((margin - 8, sheet.height * (2 * i + 1) / 4), name, fill="black", font=font, anchor="rm")
    return picture


def make_report(table: str, picture: bytes) -> str:
    """Return one page that needs no other file."""
    source = base64.b64encode(picture).decode()
    return (
        '<!doctype html><meta charset="utf-8"><title>align_sd on the toy world</title>'
        "<style>:root{color-scheme:light dark}body{font:16px/1.5 system-ui;max-width:70rem;margin:2rem auto;padding:0 1rem}"
        "img{max-width:100%;image-rendering:pixelated}pre{overflow-x:auto}</style>"
        "<h1>align_sd on the toy world</h1><p>The same prompts and seeds: base above, adapted with the negative prompt below.</p>"
        f'<img src="data:image/png;base64,{source}" alt="base above adapted"><pre>{html.escape(table)}</pre>\n'
    )


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
