"""How fast pictures in zips become rows with their HPS: the plain loop, process_diffusiondb.py, and the two limits.

    python -m benchmarks.scoring                        # ViT-L/14 with random weights, fp16 on a GPU, fp32 on a CPU
    python -m benchmarks.scoring --kind PNG             # DiffusionDB-2M's files; the default, WEBP, are DiffusionDB-large's
    python -m benchmarks.scoring --half_precision       # only how far fp16 moves the scores

plain    the README's snippet batched as the original did it: 4 workers, batches of 16, a text encoding an image
ours     process_diffusiondb.py from the loaded model to the last written row, blur test and fingerprint included
decode   reading, decoding and preprocessing alone, on all cores
encoder  the image tower's forward alone, on tensors that are there

The pictures are 512 px, lossless, four a prompt, and compress as DiffusionDB's do (about 400 kB). The lower of decode and
encoder is the limit that ours is divided by.
"""

import argparse
import io
import json
import os
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image

import process_diffusiondb as stage
from benchmarks import tables
from utils import diffusiondb, hps
from utils.images import open_image

PROMPT = "a portrait of a lighthouse keeper in a storm, oil painting, intricate, by greg rutkowski, trending on artstation, number"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=["WEBP", "PNG"], default="WEBP")
    parser.add_argument("--pictures", type=int, help="default: 8,000 on a GPU, 32 on a CPU")
    parser.add_argument("--precision", choices=["fp32", "fp16"], help="default: fp16 on a GPU, fp32 on a CPU")
    parser.add_argument("--batch_size", type=int, help="of ours and the encoder; default: 128 on a GPU, 8 on a CPU")
    parser.add_argument("--num_workers", type=int, help="of ours; default: the cores on a GPU, 1 on a CPU")
    parser.add_argument("--half_precision", action="store_true")
    return parser.parse_args()


def main(args):
    gpu = torch.cuda.is_available()
    settings = {
        "model": hps.DEFAULT_MODEL,
        "kind": args.kind,
        "pictures": args.pictures or (8000 if gpu else 32),
        "precision": args.precision or ("fp16" if gpu else "fp32"),
        "batch_size": args.batch_size or (128 if gpu else 8),
        "num_workers": args.num_workers or (cores() if gpu else 1),
    }
    if args.half_precision:
        print(f"fp16: the score moves by at most {tables.apart(half_precision, settings)[0]:.4f}")
        return
    with tempfile.TemporaryDirectory() as folder:
        write_parts(Path(folder), settings["pictures"], args.kind)
        rows = tables.measure(
            ("plain: 4 workers, batch 16, a text an image", plain, folder, settings),
            ("ours: process_diffusiondb.py", ours, folder, settings),
            (f"decode and preprocess alone, {cores()} processes", decode, folder, settings),
            ("encoder alone, resident tensors", encoder, folder, settings),
        )
    binding = min(rows[2:], key=lambda row: row["speed"])
    binding["what"] = f"limit: {binding['what']}"
    tables.report(f"scoring_{args.kind.lower()}", rows, **settings)


def cores() -> int:
    return len(os.sched_getaffinity(0))


def write_parts(folder: Path, pictures: int, kind: str):
    """Write parts of at most 1,000 pictures; beyond 64 their contents repeat under other names."""
    contents = []
    for i in range(min(pictures, 64)):
        file = io.BytesIO()
        picture(i).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
        contents.append(file.getvalue())
    for number in range(-(-pictures // 1000)):
        names = range(number * 1000, min(pictures, (number + 1) * 1000))
        index = {f"{i}.{kind.lower()}": {"p": f"{PROMPT} {i // 4}"} for i in names}
        with zipfile.ZipFile(folder / f"part-{number + 2:06d}.zip", "w") as archive:
            archive.writestr(f"part-{number + 2:06d}.json", json.dumps(index))
            for i, name in zip(names, index, strict=True):
                archive.writestr(name, contents[i % len(contents)])


def picture(seed: int) -> Image.Image:
    """Return 512 px of noise at several scales: detail as in a painting."""
    rng = np.random.default_rng(seed)
    sums = np.zeros((512, 512, 3))
    for size in (4, 16, 64, 256):
        noise = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
        sums += np.asarray(noise.resize((512, 512), Image.Resampling.BICUBIC)) / size**0.35
    return Image.fromarray(((sums - sums.min()) * (255 / np.ptp(sums))).astype(np.uint8))


def load(settings: dict, precision: str | None = None) -> hps.HPS:
    """Return a scorer of random weights, warmed up."""
    torch.manual_seed(0)
    name = settings["model"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = open_clip.create_model(name).to(device).eval()
    preprocess, tokenizer = hps.make_preprocess(model, "crop"), open_clip.get_tokenizer(name)
    scorer = hps.HPS(model, preprocess, tokenizer, device, name, name, "crop", precision or settings["precision"])
    scorer.encode_images(torch.randn(settings["batch_size"], 3, 224, 224))  # the first pass is slower
    return scorer


class Plain(torch.utils.data.Dataset):
    """The pictures of the zips one by one, preprocessed, with their prompts' tokens if there is a tokenizer."""

    def __init__(self, folder: str, preprocess, tokenizer=None):
        self.preprocess, self.tokenizer, self.archives = preprocess, tokenizer, {}
        self.rows = []
        for part in diffusiondb.find_parts(folder):
            with diffusiondb.open_part(part.path) as archive:
                self.rows += [(part.path, row) for row in diffusiondb.read_rows(archive, part.number)[0]]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        path, row = self.rows[i]
        if path not in self.archives:
            self.archives = {path: zipfile.ZipFile(path)}
        image = self.preprocess(open_image(io.BytesIO(self.archives[path].read(row.image))))
        return (image, self.tokenizer([row.prompt])[0]) if self.tokenizer else image


def plain(folder: str, settings: dict) -> float:
    scorer = load(settings)
    start = time.perf_counter()
    loader = torch.utils.data.DataLoader(Plain(folder, scorer.preprocess, scorer.tokenizer), 16, num_workers=4)
    scores = []
    for images, tokens in loader:
        with torch.no_grad(), scorer._autocast():
            image_features = scorer.model.encode_image(images.to(scorer.device))
            text_features = scorer.model.encode_text(tokens.to(scorer.device))
        image_features = image_features / image_features.norm(dim=-1, keepdim=True)
        text_features = text_features / text_features.norm(dim=-1, keepdim=True)
        scores += (image_features * text_features).sum(-1).tolist()
    return len(scores) / (time.perf_counter() - start)


def ours(folder: str, settings: dict) -> float:
    scorer = load(settings)
    with tempfile.TemporaryDirectory() as place:
        options = ["--batch_size", settings["batch_size"], "--num_workers", settings["num_workers"]]
        options += ["--clip_checkpoint", "", "--meta_file", f"{place}/meta.jsonl"]
        args = stage.parse_args([str(option) for option in options])
        Path(f"{args.meta_file}.parts").mkdir()
        parts = diffusiondb.find_parts(folder)
        start = time.perf_counter()
        stage.score_parts(parts, scorer, args, rank=1)
        images = stage.merge(args, parts)["images"]
        return images / (time.perf_counter() - start)


def decode(folder: str, settings: dict) -> float:
    model, _ = hps.build(settings["model"], None)
    pictures = Plain(folder, hps.make_preprocess(model, "crop"))
    pictures.rows = (pictures.rows * -(-1000 // len(pictures)))[:8000]
    start = time.perf_counter()
    for _ in torch.utils.data.DataLoader(pictures, 16, num_workers=cores()):
        pass
    return len(pictures) / (time.perf_counter() - start)


def encoder(folder: str, settings: dict) -> float:
    scorer = load(settings)
    batch = torch.randn(settings["batch_size"], 3, 224, 224, device=scorer.device)
    batches = max(settings["pictures"] // len(batch), 1)
    tables.synchronize(scorer.device.type)
    start = time.perf_counter()
    for _ in range(batches):
        scorer.encode_images(batch)
    tables.synchronize(scorer.device.type)
    return batches * len(batch) / (time.perf_counter() - start)


def half_precision(settings: dict) -> float:
    """Return the largest difference of fp16's scores from fp32's, over eight pictures with each of eight prompts."""
    scorer = load(settings, "fp32")
    pixels = torch.stack([scorer.preprocess(picture(i)) for i in range(8)])
    prompts = [f"{PROMPT} {i}" for i in range(8)]
    scores = []
    for scorer.precision in ("fp32", "fp16"):
        scores.append(100 * scorer.encode_images(pixels) @ scorer.encode_prompts(prompts).T)
    return (scores[1] - scores[0]).abs().max().item()


if __name__ == "__main__":
    main(parse_args())
