"""A page about a selection, to choose its threshold by eye: what was dropped and why, histograms, and examples.

FOLDER/index.html shows them; the histograms and the examples' pictures lie beside it, and nothing comes from elsewhere.
"""

import io
from html import escape
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils import diffusiondb, jsonl
from utils.errors import UserError
from utils.images import open_image, to_rgb

EXAMPLES = 6  # of each kind
SIBLINGS = 12  # of a prompt, at most
SIDE = 192  # pixels, of an example's picture
STYLE = (
    "body{font:15px sans-serif;margin:2em;max-width:75em}td,th{padding:.1em 1em;text-align:right}"
    "figure{display:inline-block;margin:.3em;text-align:center;vertical-align:top;width:150px;font-size:12px;overflow-wrap:anywhere}"
    ".chosen img{outline:4px solid #2a7}.chosen.negative img{outline-color:#c33}img{max-width:100%}"
)


def write(folder: str | Path, sides: dict, groups, meta, counts: dict, passing: list, threshold: float, open_part):
    """Write the page. `sides` maps positive and negative to what stands out (rows, p, n), one a prompt of `groups`.

    `passing` holds a row (threshold, positives, negatives) a threshold. `open_part(number)` returns a part's zip, or
    raises ValueError.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    examples = {
        (kind, what): found for kind, side in sides.items() for what, found in pick(side, threshold, groups).items()
    }
    wanted = sorted({int(row) for found in examples.values() for _, rows in found for row in rows})
    places = {row: (meta["part"][row].as_py(), meta["image"][row].as_py()) for row in wanted}
    pictures = save_pictures(folder / "images", places, open_part)

    def figure(row: int, kind: str, chosen: bool) -> str:
        file, why = pictures[row]
        shown = f'<img src="images/{escape(file)}">' if file else escape(why)
        name = "{:06d}-{}".format(*places[row])
        return (
            f'<figure class="{"chosen " + kind if chosen else ""}">{shown}<figcaption>'
            f"{meta['score'][row].as_py():.4f}<br>{escape(name)}</figcaption></figure>"
        )

    body = ["<h1>Selection</h1><table>"]
    body += [f"<tr><td>{n:,}<td>{escape(what.replace('_', ' '))}" for what, n in counts.items()]
    body.append("</table><h2>What other thresholds would choose</h2><table><tr><th>threshold<th>positive<th>negative")
    body += [f"<tr><td>{edge:.2f}<td>{positive:,}<td>{negative:,}" for edge, positive, negative in passing]
    body.append("</table>")
    body += [f'<p><img src="{name}">' for name in histograms(folder, sides, groups, threshold)]
    for (kind, what), found in examples.items():
        body.append(f"<h2>{kind.capitalize()}, {what}</h2>")
        for group, rows in found:
            _, p, n = (column[group] for column in sides[kind])
            prompt = meta["prompt"][int(rows[0])].as_py()
            body.append(f"<p>p = {p:.4f}, n = {n}, p n = {p * n:.2f}: <q>{escape(prompt)}</q><br>")
            chosen = sides[kind].rows[group]
            body += [figure(int(row), kind, row == chosen and what != "just below the threshold") for row in rows]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Selection</title><style>{STYLE}</style>'
    jsonl.write_whole(folder / "index.html", head + "\n".join(body) + "\n")


def pick(side, threshold: float, groups) -> dict[str, list[tuple[int, np.ndarray]]]:
    """Return the most and the least confident prompts and those that just fail: (prompt's place, its rows by score)."""
    ratio = side.p * side.n
    order = np.argsort(-ratio, kind="stable")
    passing = int((ratio > threshold).sum())
    chosen, rest = order[:passing], order[passing:]

    def with_siblings(places):
        for i in places:
            rows = groups.rows[groups.starts[i] : groups.starts[i] + groups.sizes[i]]
            scores = groups.scores[groups.starts[i] : groups.starts[i] + groups.sizes[i]]
            first = rows == side.rows[i]  # what stands out leads, whatever else of a large group fits
            yield int(i), rows[np.lexsort((-scores, ~first))][:SIBLINGS]

    return {
        "most confident": list(with_siblings(chosen[:EXAMPLES])),
        "least confident": list(with_siblings(chosen[-EXAMPLES:][::-1])),
        "just below the threshold": list(with_siblings(rest[:EXAMPLES])),
    }


def save_pictures(folder: Path, places: dict[int, tuple[int, str]], open_part) -> dict[int, tuple[str | None, str]]:
    """Save each row's picture, small; return its file's name, or None and why there is none."""
    saved, archives = {}, {}
    for row, (part, image) in tqdm(places.items(), desc="examples", unit="image"):
        try:
            if part not in archives:
                archives = {part: open_part(part)}  # rows come in the order of their parts
            picture = to_rgb(open_image(io.BytesIO(diffusiondb.read_image(archives[part], image))))
            picture.thumbnail((SIDE, SIDE))
            encoded = io.BytesIO()
            picture.save(encoded, "JPEG", quality=85)
            name = f"{part:06d}-{image}.jpg"
            jsonl.write_whole(folder / name, encoded.getvalue())
            saved[row] = name, ""
        except UserError:  # the hub cannot be reached: no other picture will do better
            raise
        except ValueError as why:
            saved[row] = None, str(why)
    return saved


def histograms(folder: Path, sides: dict, groups, threshold: float) -> list[str]:
    """Write three histograms as PNG: HPS of the images, p n of each prompt's outstanding ones, images a prompt."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = []

    def draw(name: str, label: str, columns: dict[str, np.ndarray], bins, line: float | None = None):
        figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
        for what, values in columns.items():
            axes.hist(values, bins, histtype="step" if len(columns) > 1 else "stepfilled", label=what)
        if line is not None:
            axes.axvline(line, color="black", linestyle="--", label="threshold")
        if len(columns) > 1:
            axes.legend()
        axes.set(xlabel=label, ylabel="count")
        encoded = io.BytesIO()
        figure.savefig(encoded, format="png", dpi=100)
        pyplot.close(figure)
        jsonl.write_whole(folder / f"{name}.png", encoded.getvalue())
        names.append(f"{name}.png")

    ratios = {kind: side.p * side.n for kind, side in sides.items()}
    largest = max((float(ratio.max(initial=1)) for ratio in ratios.values()), default=1.0)
    sizes = groups.sizes.clip(max=50)
    draw("hps", "HPS of the images", {"images": groups.scores}, 100)
    draw("confidence", "confidence p n", ratios, np.linspace(1, max(largest, 1.1), 100), threshold)
    draw("images", "images a prompt (50: or more)", {"prompts": sizes}, np.arange(0.5, sizes.max(initial=1) + 1))
    return names
