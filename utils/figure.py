"""The paper's figure: chosen prompts, a row a model, the baseline's on top, captions below."""

import textwrap
from pathlib import Path

import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure

from utils.errors import UserError
from utils.images import open_image, to_rgb

CELL, GAP, LEFT, LINE = 1.5, 0.05, 0.45, 0.16  # inches


def draw(path: Path, labels: list[str], captions: list[str], pictures: list[list[Path]]):
    """Write the figure as PNG, whole or not at all; `pictures[k]` holds prompt k's pictures in the order of the labels."""
    lines = [textwrap.wrap(caption, 24)[:6] for caption in captions]
    step, below = CELL + GAP, LINE * max(map(len, lines)) + 0.1
    width, height = LEFT + step * len(captions), step * len(labels) + below
    # Prompts are no mathematics, whatever dollar signs they have.
    with pyplot.rc_context({"font.family": "DejaVu Sans", "text.parse_math": False}):
        figure = Figure(figsize=(width, height), dpi=120, facecolor="white")
        for m, label in enumerate(labels):
            bottom = below + step * (len(labels) - 1 - m)
            shown = label if len(label) <= 24 else f"{label[:11]}…{label[-12:]}"
            figure.text(
                0.2 / width, (bottom + CELL / 2) / height, shown, rotation=90, ha="center", va="center", fontsize=9
            )
            for k, images in enumerate(pictures):
                axes = figure.add_axes(np.divide((LEFT + step * k, bottom, CELL, CELL), (width, height, width, height)))
                try:
                    image = to_rgb(open_image(images[m]))
                except ValueError as error:
                    raise UserError(f"{images[m]}: {error}") from None
                # Pictures of a few pixels are shown as such.
                axes.imshow(image, interpolation="nearest" if image.width < 128 else "antialiased")
                axes.set_axis_off()
        for k, wrapped in enumerate(lines):
            x, y = (LEFT + step * k + CELL / 2) / width, (below - 0.06) / height
            figure.text(x, y, "\n".join(wrapped), ha="center", va="top", fontsize=7.5)
        temporary = path.with_name(f".{path.name}.tmp.png")
        figure.savefig(temporary)
    temporary.replace(path)
