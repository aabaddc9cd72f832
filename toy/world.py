"""The embedded world: pictures of shapes, captions for them, and a rule that stands for the human's taste.

A picture is a coloured shape on a plain background, 32 x 32 pixels. Half of what the toy Stable Diffusion learned from
is *deformed* (limbs stick out, bites are taken away) and no caption says so, as no caption of the web says "six fingers".
`human_score` measures how close a picture is to the clean shape that its caption asks for. The pipeline never calls it:
it sees only choices that were made with it, so it can judge in the end whether people would like the result better.

    python -m toy.world        # shows the world: writes toy_world.png, prints the scores of clean and deformed pictures
"""

from functools import lru_cache
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw

SIZE = 32  # pixels
OVERSAMPLING = 4  # shapes are drawn this much larger and reduced, so their edges are smooth

COLORS = {"red": (214, 40, 40), "green": (38, 166, 70), "blue": (44, 82, 220), "yellow": (244, 204, 38)}
SHAPES = ("circle", "square", "triangle")
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0)}

# What people add to their prompts. Nothing in the picture follows from it.
STYLES = (
    "oil painting", "digital art", "studio photo", "watercolor", "pencil sketch", "3 d render", "anime style",
    "concept art", "pixel art", "low poly", "matte painting", "children's book illustration", "isometric",
)  # fmt: skip
QUALITIES = (
    "4 k", "8 k", "highly detailed", "trending on artstation", "sharp focus", "masterpiece", "cinematic lighting",
    "by greg rutkowski", "unreal engine", "award winning", "soft light", "hdr",
)  # fmt: skip

# A human calls a picture deformed below this score: between the lowest clean and the highest deformed rendering.
DEFORMED_BELOW = 0.75


def captions() -> list[str]:
    """Return the 24 plain captions, such as "a red circle on a white background"."""
    return [f"a {c} {s} on a {b} background" for c in COLORS for s in SHAPES for b in BACKGROUNDS]


def prompts() -> list[str]:
    """Return every prompt that a user of this world may type: caption, style and quality, 3,744 in all."""
    return [f"{caption}, {style}, {quality}" for caption in captions() for style in STYLES for quality in QUALITIES]


def parse_caption(caption: str) -> tuple[str, str, str]:
    """Return (color, shape, background) named in a caption; ValueError if it names none of this world."""
    words = caption.lower().replace(",", " ").split()
    try:
        color = next(w for w in words if w in COLORS)
        shape = next(w for w in words if w in SHAPES)
        background = words[words.index("background") - 1]
        return color, shape, {b: b for b in BACKGROUNDS}[background]
    except (StopIteration, ValueError, KeyError):
        raise ValueError(f"not a caption of the toy world: {caption!r}") from None


def outline(shape: str, x: float, y: float, radius: float, angle: float) -> list[tuple[float, float]]:
    """Return the corners (pixels) of a shape around (x, y); `angle` in radians; all shapes have about the same area."""
    corners, scale = {"circle": (48, 1.0), "square": (4, 1.25), "triangle": (3, 1.45)}[shape]
    start = {"circle": 0.0, "square": pi / 4, "triangle": -pi / 2}[shape] + angle
    turns = [start + 2 * pi * i / corners for i in range(corners)]
    y += 0.2 * radius if shape == "triangle" else 0.0  # the centre of its box, not of its mass
    return [(x + scale * radius * cos(a), y + scale * radius * sin(a)) for a in turns]


def draw_mask(shape: str, x: float, y: float, radius: float, angle: float, deform: np.random.Generator | None = None):
    """Return the coverage of each pixel by the shape, float32 (32, 32) in [0, 1]; deformed with randomness from `deform`."""
    s = OVERSAMPLING
    image = Image.new("L", (SIZE * s, SIZE * s), 0)
    pen = ImageDraw.Draw(image)
    pen.polygon([(px * s, py * s) for px, py in outline(shape, x, y, radius, angle)], fill=255)
    if deform is not None:
        turn = deform.uniform(0, 2 * pi)
        for direction in turn + np.array([0.0, 1.9, 3.8]) + deform.uniform(-0.3, 0.3, 3):
            reach, width = deform.uniform(1.85, 2.1) * radius, deform.uniform(2.6, 3.4)
            tip = (x + reach * cos(direction), y + reach * sin(direction))
            pen.line([(x * s, y * s), (tip[0] * s, tip[1] * s)], fill=255, width=round(width * s))
        direction, bite = turn + 4.95 + deform.uniform(-0.2, 0.2), deform.uniform(0.62, 0.74) * radius
        bx, by = x + 0.7 * radius * cos(direction), y + 0.7 * radius * sin(direction)
        pen.ellipse([(bx - bite) * s, (by - bite) * s, (bx + bite) * s, (by + bite) * s], fill=0)
    return np.asarray(image.reduce(s), dtype=np.float32) / 255


def render(caption: str, rng: np.random.Generator, deformed: bool = False) -> Image.Image:
    """Draw what the caption says, with place, size and tilt from `rng`; a 32 x 32 RGB picture."""
    color, shape, background = parse_caption(caption)
    x, y = rng.uniform(14, 18, 2)
    mask = draw_mask(shape, x, y, rng.uniform(7, 10), rng.uniform(-0.2, 0.2), rng if deformed else None)[..., None]
    ink, paper = np.array(COLORS[color], np.float32), np.array(BACKGROUNDS[background], np.float32)
    return Image.fromarray((paper + mask * (ink - paper)).round().astype(np.uint8))


@lru_cache
def templates(shape: str) -> tuple[np.ndarray, np.ndarray]:
    """Return clean masks in every place, size and tilt, float32 (n, 1024), and their areas (n,)."""
    tilts = (0.0,) if shape == "circle" else (-0.2, -0.1, 0.0, 0.1, 0.2)
    places = np.arange(13.0, 19.01, 1.0)
    bank = [
        draw_mask(shape, x, y, r, a).ravel()
        for r in (7, 7.75, 8.5, 9.25, 10)
        for a in tilts
        for x in places
        for y in places
    ]
    return np.stack(bank), np.stack(bank).sum(1)


def human_score(image: Image.Image, caption: str) -> float:
    """How much a human likes the picture for its caption, in [0, 1]: best overlap with a clean shape times colour match.

    Each pixel is split into ink and paper along the line from the background's colour to the shape's; the ink is
    compared with every clean template (sum of minima over sum of maxima), and what lies off that line, weighted by where
    the ink is, lowers the colour match.
    """
    color, shape, background = parse_caption(caption)
    pixels = np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX), np.float32).reshape(-1, 3)
    ink, paper = np.array(COLORS[color], np.float32), np.array(BACKGROUNDS[background], np.float32)
    line = ink - paper
    mask = ((pixels - paper) @ line / (line @ line)).clip(0, 1)
    off = np.linalg.norm(pixels - (paper + mask[:, None] * line), axis=1) / 255
    color_match = float(np.exp(-(((off @ (mask + 0.1)) / (mask + 0.1).sum() / 0.35) ** 2)))
    bank, areas = templates(shape)
    common = np.minimum(bank, mask).sum(1)
    overlap = float((common / (areas + mask.sum() - common)).max())
    return overlap * color_match


def right_color(image: Image.Image, caption: str) -> bool:
    """Whether the picture's border has the caption's background, and what is drawn on it the caption's colour."""
    color, _, background = parse_caption(caption)
    pixels = np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX), np.float32)

    def nearest(pixel, palette):
        return min(palette, key=lambda name: np.linalg.norm(pixel - np.array(palette[name], np.float32)))

    border = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    ink = pixels[np.linalg.norm(pixels - border, axis=2) > 128]
    drawn = len(ink) >= 16 and nearest(np.median(ink, axis=0), COLORS) == color
    return drawn and nearest(border, COLORS | BACKGROUNDS) == background


def contact_sheet(images: list[Image.Image], columns: int, zoom: int = 3, gap: int = 2) -> Image.Image:
    """Put pictures side by side, enlarged without smoothing."""
    cell = SIZE * zoom + gap
    sheet = Image.new("RGB", (columns * cell + gap, -(-len(images) // columns) * cell + gap), (128, 128, 128))
    for i, image in enumerate(images):
        big = image.convert("RGB").resize((SIZE * zoom, SIZE * zoom), Image.Resampling.NEAREST)
        sheet.paste(big, (gap + i % columns * cell, gap + i // columns * cell))
    return sheet


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    shown = [render(c, rng, deformed) for deformed in (False, True) for c in captions()]
    contact_sheet(shown, columns=12).save("toy_world.png")
    for deformed in (False, True):
        scores = np.array([human_score(render(c, rng, deformed), c) for c in captions() * 40])
        print(
            f"{'deformed' if deformed else 'clean'}: mean {scores.mean():.3f}, from {scores.min():.3f} to {scores.max():.3f}"
        )
