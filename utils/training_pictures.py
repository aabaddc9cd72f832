"""The pictures that the LoRA trains on: read from the stages' rows, checked, cropped, and shared out in batches.

Everything random about a picture comes from (seed, epoch, picture), so what a step sees depends neither on the number of
processes and workers, nor on how the global batch is split, nor on being interrupted.
"""

import hashlib
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from utils.errors import UserError
from utils.images import open_image, to_rgb
from utils.jsonl import Appender, read, read_with_places

KINDS = ("positive", "negative", "regularization")
IN_A_ROW = 100  # so many pictures that cannot be decoded are no accident


def read_rows(args) -> list[dict]:
    """Return the rows of the two files: `image` (its path), `name` (as the file has it), `prompt`, `type`, `where` (file and line)."""
    if not args.annotation_file and not args.regularization_annotation:
        raise UserError("nothing to train on: give --annotation_file, --regularization_annotation or both")
    rows = []
    for path, caption in ((args.annotation_file, "prompt"), (args.regularization_annotation, "caption")):
        if not path:
            continue
        folder = Path(args.dataset_folder or Path(path).parent)
        fields = {"file_name": str, caption: str} | ({"type": str} if caption == "prompt" else {})
        for where, row in read_with_places(path, fields):
            kind, name = row.get("type") if caption == "prompt" else "regularization", row["file_name"]
            if kind not in KINDS:
                raise UserError(f"{where}: type is {kind!r}, not positive or negative")
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(f"{where}: {name!r} leaves the folder")
            rows.append({"image": folder / name, "name": name, "prompt": row[caption], "type": kind, "where": where})
    if args.max_train_samples and args.max_train_samples < len(rows):
        chosen = np.random.default_rng(args.seed).permutation(len(rows))[: args.max_train_samples]
        rows = [rows[i] for i in sorted(chosen)]
    return rows


def digest(rows: list[dict]) -> str:
    """Return how many rows there are and a checksum of their names, prompts and types, in order."""
    checksum = hashlib.sha256()
    for row in rows:
        checksum.update(repr((row["name"], row["prompt"], row["type"])).encode())
    return f"{len(rows)} pictures, {checksum.hexdigest()[:12]}"


def unusable(rows: list[dict], full: bool) -> list[str | None]:
    """Return for each row what is wrong with its picture, or None: a look at size and head, or the whole decoding."""
    with ThreadPoolExecutor() as pool:
        reasons = pool.map(why_unusable, [row["image"] for row in rows], [full] * len(rows))
        return list(tqdm(reasons, "check_data", len(rows), unit="picture", disable=len(rows) < 10_000 and not full))


def why_unusable(path: Path, full: bool) -> str | None:
    """Return what is wrong with the picture, or None."""
    try:
        if path.stat().st_size == 0:
            return "an empty file"
        if full:
            open_image(path)
        else:
            Image.open(path).close()
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"not a readable picture: {error}".replace(f" {str(path)!r}", "").replace("picture: not a readable ", "")
    return None


class TrainingBatches(Dataset):
    """The micro-batches of one process from `first_step` on.

    The pictures come as an endless row of epochs, each in an order of (seed, epoch); step k takes the k-th global batch
    of it, and the micro-batches and processes share that batch out. A batch of b pictures holds

        pixels                  uint8 (b, 3, resolution, resolution), or with a latent cache
        mean, logvar            float16 (b, channels, height, width): the VAE's posterior
        tokens                  int64 (b, 77), or with `prompts` (a dict from prompt to number) prompt: int64 (b,)
        noise, vae_noise        float32 (b, channels, height, width)
        timesteps, kind         int64 (b,); kind counts KINDS
    """

    def __init__(
        self, rows, args, tokenizer, timesteps, latent_shape, rank=0, processes=1, first_step=0, cache=None, prompts=None
    ):  # fmt: skip
        self.rows, self.args, self.tokenizer, self.cache, self.prompts = rows, args, tokenizer, cache, prompts
        self.timesteps, self.latent_shape = timesteps, latent_shape
        self.rank, self.processes, self.first_step = rank, processes, first_step
        self.broken = set()

    def __len__(self):
        return (self.args.max_train_steps - self.first_step) * self.args.gradient_accumulation_steps

    def __getitem__(self, index):
        micro_batch = self.first_step * self.args.gradient_accumulation_steps + index
        start = (micro_batch * self.processes + self.rank) * self.args.train_batch_size
        items = [self.load(*divmod(i, len(self.rows))) for i in range(start, start + self.args.train_batch_size)]
        batch = {key: torch.stack([item[key] for item in items]) for key in items[0] if key != "prompt"}
        batch["kind"] = torch.tensor([item["kind"] for item in items])
        texts = [item["prompt"] for item in items]
        if self.prompts is not None:
            batch["prompt"] = torch.tensor([self.prompts[text] for text in texts])
        else:
            batch["tokens"] = tokenize(self.tokenizer, texts)
        return batch

    def load(self, epoch: int, position: int) -> dict:
        """Return one training example, drawn from (seed, epoch, picture)."""
        picture = int(epoch_order(self.args.seed, epoch, len(self.rows))[position])
        for _ in range(IN_A_ROW):
            if (content := self.content(picture, epoch)) is not None:
                break
            picture = (picture + 1) % len(self.rows)  # its head was fine, its body is not: the next takes its place
        else:
            raise UserError(f"{IN_A_ROW} pictures in a row cannot be decoded, see {self.args.output_dir}/errors.jsonl")
        row = self.rows[picture]
        seed = np.random.SeedSequence((self.args.seed, epoch, picture)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(seed))
        bare, dropout = torch.rand(2, generator=generator).tolist()
        prompt = row["prompt"]
        if row["type"] == "negative":
            prompt = self.args.negative_prefix + ("" if bare < self.args.bare_prefix_prob else prompt)
        if dropout < self.args.prompt_dropout:
            prompt = ""
        return content | {
            "prompt": prompt,
            "kind": torch.tensor(KINDS.index(row["type"])),
            "timesteps": torch.randint(0, self.timesteps, (), generator=generator),
            "noise": torch.randn(self.latent_shape, generator=generator),
            "vae_noise": torch.randn(self.latent_shape, generator=generator),
        }

    def content(self, picture: int, epoch: int) -> dict | None:
        """Return the picture's pixels or latents in this epoch, or None if it cannot be decoded, which is logged."""
        row = self.rows[picture]
        if self.cache is not None:
            return self.cache.get(picture, epoch)
        try:
            return {"pixels": cut(row, crop_of(row, epoch, self.args), self.args.resolution)}
        except ValueError as error:
            if picture not in self.broken:
                self.broken.add(picture)
                log_broken(row, error, self.args.output_dir)
            return None


def tokenize(tokenizer, texts: list[str]) -> torch.Tensor:
    """Return token ids, int64 (n, 77)."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def log_broken(row: dict, reason, output: str | Path):
    """Say that another picture takes this one's place, and write it to errors.jsonl: once, however many workers find it."""
    error = {"item": f"{row['where']}: {row['name']}", "stage": "train", "reason": str(reason)}
    path = Path(output) / "errors.jsonl"
    with Appender(path) as file:
        if error not in read(path):
            file.write(error)
            print(f"{error['item']}: {reason}; another picture takes its place", file=sys.stderr)


def possible_prompts(rows: list[dict], args) -> list[str]:
    """Return all that the pictures may be trained under, each once."""
    found = {"": None} if args.prompt_dropout else {}
    for row in rows:
        if row["type"] != "negative":
            found[row["prompt"]] = None
        else:
            found[args.negative_prefix + row["prompt"]] = None
            if args.bare_prefix_prob:
                found[args.negative_prefix] = None
    return list(found)


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return the order of the pictures in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def crop_of(row: dict, epoch: int, args) -> tuple[float, float, bool]:
    """Return where to crop, from 0 (left, top) to 1 (right, bottom), and whether to mirror.

    Drawn from (seed, epoch, file name): a crop that a latent cache holds stays right when other rows come or go.
    """
    x, y, flip = np.random.default_rng((args.seed, epoch, zlib.crc32(row["name"].encode()))).random(3).tolist()
    if args.center_crop:
        x = y = 0.5
    return x, y, bool(args.random_flip and flip < 0.5)


def cut(row: dict, crop: tuple[float, float, bool], side: int) -> torch.Tensor:
    """Decode the picture, resize its shortest side and crop a square: uint8 (3, side, side); ValueError if it cannot be decoded."""
    x, y, flip = crop
    image = to_rgb(open_image(row["image"]))
    scale = side / min(image.size)
    width, height = max(side, round(image.width * scale)), max(side, round(image.height * scale))
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too long and thin")
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round(x * (width - side)), round(y * (height - side))
    image = image.crop((left, top, left + side, top + side))
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return pil_to_tensor(image)
