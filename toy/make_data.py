"""Make the stages' inputs in the toy world, in the formats they have in the wild.

    python -m toy.make_data --output demo/world

Writes  dataset/preference_{train,test}.json, dataset/preference_images/     pictures of the toy Stable Diffusion, four a prompt;
                                                                            the human picks one, with some noise
        diffusiondb/part-000002.zip ...                                     WebP pictures and a part-000002.json, as DiffusionDB:
                                                                            some blurred, one that does not decode
        web/, urls.jsonl                                                    pictures to serve at --url, and the table that
                                                                            names them: captions, aesthetic scores, dead links
        prompts.json, validation_prompts.txt                                prompts that none of the above used

Every picture comes from (seed, what it is for, number). Files appear whole; a rerun makes only what is missing.
"""

import argparse
import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

from toy import world
from utils import pipeline, runs
from utils.errors import one_line_errors
from utils.jsonl import dumps, write_whole

MODEL = Path(__file__).parent / "models" / "stable-diffusion"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo/world"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train_prompts", type=int, default=900, help="of the preference data set")
    parser.add_argument("--test_prompts", type=int, default=400, help="of the preference data set")
    parser.add_argument("--choice_noise", type=float, default=0.1, help="the human picks by softmax(score / this)")
    parser.add_argument("--parts", type=int, default=2, help="of DiffusionDB")
    parser.add_argument("--part_prompts", type=int, default=120, help="a part")
    parser.add_argument("--part_images", type=int, default=5, help="a prompt")
    parser.add_argument("--web_pictures", type=int, default=520)
    parser.add_argument("--evaluation_prompts", type=int, default=480)
    parser.add_argument("--url", default="http://127.0.0.1:8473", help="where web/ will be served")
    parser.add_argument("--num_inference_steps", type=int, default=15)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--batch_size", type=int, default=48)
    return parser.parse_args(argv)


def main(args):
    args.output.mkdir(parents=True, exist_ok=True)
    runs.begin(args.output / "run.json", {k: v for k, v in vars(args).items() if k not in ("output", "batch_size")})

    # Deal out the prompts: those that judge the result in the end are used nowhere else.
    prompts = np.random.default_rng(args.seed).permutation(world.prompts()).tolist()
    counts = [args.train_prompts, args.test_prompts, args.parts * args.part_prompts, args.evaluation_prompts, 4]
    train, test, users, evaluation, validation = (
        prompts[a:b] for a, b in zip(np.cumsum([0, *counts]), np.cumsum(counts), strict=False)
    )

    painter = Painter(args)
    make_preferences(args, painter, train, "train")
    make_preferences(args, painter, test, "test")
    for part in range(args.parts):
        # As `large_first_1m` does on the hub, the parts start at number 2.
        make_part(args, painter, users[part :: args.parts], part + 2)
    make_web(args)
    write_whole(args.output / "prompts.json", json.dumps(evaluation, indent=1) + "\n")
    write_whole(args.output / "validation_prompts.txt", "\n".join(validation) + "\n")


class Painter:
    """The toy Stable Diffusion, loaded when the first picture is needed; picture i of a purpose has its own seed."""

    def __init__(self, args):
        self.args, self.pipe = args, None

    def paint(self, prompts: list[str], purpose: int, name: str) -> list[Image.Image]:
        from utils import sampling

        self.pipe = self.pipe or pipeline.place(pipeline.load(str(MODEL)))
        side, negative = pipeline.side(self.pipe), sampling.encode(self.pipe, [""])
        first = int(np.random.SeedSequence((self.args.seed, purpose)).generate_state(1)[0])
        images = []
        bar = tqdm(total=len(prompts), desc=name, unit="image")
        for i in range(0, len(prompts), self.args.batch_size):
            texts = prompts[i : i + self.args.batch_size]
            drawn = sampling.draw(
                self.pipe, texts, range(first + i, first + i + len(texts)), negative, self.args.num_inference_steps,
                self.args.guidance_scale, side, side,
            )  # fmt: skip
            images += sampling.to_images(drawn)
            bar.update(len(texts))
        bar.close()
        return images


def make_preferences(args, painter: Painter, prompts: list[str], split: str):
    """Four pictures a prompt, and the human's choice among them."""
    path = args.output / "dataset" / f"preference_{split}.json"
    if path.exists():
        return
    folder = path.parent / "preference_images"
    folder.mkdir(parents=True, exist_ok=True)
    purpose = {"train": 1, "test": 2}[split]
    images = painter.paint([prompt for prompt in prompts for _ in range(4)], purpose, f"preference_{split}")
    rng = np.random.default_rng((args.seed, purpose))
    rows = []
    for i, prompt in enumerate(prompts):
        four = images[4 * i : 4 * i + 4]
        liked = np.exp(np.array([world.human_score(image, prompt) for image in four]) / args.choice_noise)
        identity = purpose * 100_000 + i
        names = [f"{identity}_{k}.jpg" for k in range(4)]
        for image, name in zip(four, names, strict=True):
            image.save(folder / name, quality=95)
        rows.append(
            {
                "human_preference": int(rng.choice(4, p=liked / liked.sum())),
                "prompt": prompt,
                "id": identity,
                "file_path": names,
                "user_hash": f"{rng.integers(20):08x}",
                "contain_name": "rutkowski" in prompt,
            }
        )
    write_whole(path, json.dumps(rows, indent=1) + "\n")


def make_part(args, painter: Painter, prompts: list[str], part: int):
    """One zip of DiffusionDB: several pictures a prompt in WebP, one in twenty blurred, one file cut short."""
    path = args.output / "diffusiondb" / f"part-{part:06d}.zip"
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    repeated = [prompt for prompt in prompts for _ in range(args.part_images)]
    images = painter.paint(repeated, 10 + part, path.stem)
    rng = np.random.default_rng((args.seed, 10 + part))
    meta, buffer = {}, io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i, (image, prompt) in enumerate(zip(images, repeated, strict=True)):
            name = f"{rng.bytes(16).hex()}.webp"
            if rng.random() < 0.05:
                image = image.filter(ImageFilter.GaussianBlur(8))
            file = io.BytesIO()
            image.save(file, "WEBP", lossless=True)
            archive.writestr(name, file.getvalue()[: 60 if i == 7 else None])
            meta[name] = {"p": prompt, "se": i, "c": args.guidance_scale, "st": args.num_inference_steps, "sa": "k_lms"}
        archive.writestr(f"{path.stem}.json", json.dumps(meta))
    write_whole(path, buffer.getvalue())


def make_web(args):
    """Good pictures and their table: captions, aesthetic scores (some too low), a dead link in ten."""
    table = args.output / "urls.jsonl"
    if table.exists():
        return
    folder = args.output / "web"
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng((args.seed, 3))
    captions = world.captions()
    rows = []
    for i in range(args.web_pictures):
        caption = captions[i % len(captions)]
        score, dead = 6.2 + 1.8 * rng.random(), rng.random() < 0.1
        if not dead:
            world.render(caption, rng).save(folder / f"{i}.png")
        text = f"{caption}, {rng.choice(world.STYLES)}" if rng.random() < 0.5 else caption
        rows.append({"URL": f"{args.url}/{i}.png", "TEXT": text, "AESTHETIC_SCORE": round(score, 3)})
    write_whole(table, "".join(map(dumps, rows)))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
