"""Human choices among the pictures of a prompt, from the files in which they were released, and how often scores agree with them.

    HPD         JSON array: prompt, file_path, human_preference (the chosen one's index), id; contain_name      (this paper)
    HPD v2      JSON array: prompt, image_path, rank (test), or prompt, file_path, human_preference of 1 and 0 (train)
    ImageReward JSON array: prompt, generations, ranking, id
    Pick-a-Pic  parquet: caption, jpg_0, jpg_1, label_0, label_1 (1, 0, or a tie's 0.5); has_label

The pictures lie in preference_images/ (HPD), in a folder named as the file (HPD v2: test.json, test/) or so with "_images"
(ImageReward: test_images/), beside the file or in it directly; Pick-a-Pic holds them itself.
"""

import io
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils import scoring
from utils.errors import UserError
from utils.images import open_image
from utils.jsonl import check, read_array


@dataclass
class Choice:
    """What people made of the pictures of one prompt."""

    where: str  # the file and the row, for messages
    prompt: str
    images: list  # paths, or cells of a parquet file; `open_choice` opens them
    ranks: list[float]  # of each image; the smallest is liked best, equal ones are tied
    ties_count: bool = False  # whether a tied pair counts half, as in Pick-a-Pic, or not at all
    contain_name: bool | None = None  # whether the prompt names a person, where the data say so

    @property
    def chosen(self) -> int:
        """The index of the image that is liked best."""
        return int(np.argmin(self.ranks))


class Cell(NamedTuple):
    """A picture within a parquet file."""

    path: str
    group: int
    row: int  # within the row group
    column: str

    @property
    def name(self) -> str:
        return f"{self.column} of row {self.row} in row group {self.group}"


def read(path: str | Path, dropped: list[dict], image_folder: str | Path | None = None) -> list[Choice]:
    """Return the choices in a file of any of the formats; what cannot be used is added to `dropped`, as rows of an error file.

    Raises UserError naming file and row of what does not follow the format, and of a path that leaves the folder.
    Whether the pictures are there and sound is not looked at here (`why_unusable`).
    """
    path = Path(path)
    if path.suffix == ".parquet":
        choices = read_pickapic(path, dropped)
    else:
        choices = read_json(path, dropped, image_folder and Path(image_folder))
    if not choices:
        said = f"; the first one: {dropped[0]['item']}: {dropped[0]['reason']}" if dropped else ""
        raise UserError(f"{path}: no usable prompts in it{said}")
    return choices


def read_json(path: Path, dropped: list[dict], image_folder: Path | None) -> list[Choice]:
    rows, choices, ids = read_array(path), [], {}
    first = rows[0] if rows and isinstance(rows[0], dict) else {}
    if "generations" in first:
        images_field, ranks_field, folder = "generations", "ranking", f"{path.stem}_images"
    elif "rank" in first:
        images_field, ranks_field, folder = "image_path", "rank", path.stem
    elif isinstance(first.get("human_preference"), list):
        images_field = "image_path" if "image_path" in first else "file_path"
        ranks_field, folder = "human_preference", path.stem
    else:
        images_field, ranks_field, folder = "file_path", "human_preference", "preference_images"
    one_chosen = folder == "preference_images"
    for i, row in enumerate(rows):
        where = f"{path}: element {i}"
        check(row, {"prompt": str, images_field: list, ranks_field: int if one_chosen else list}, where)
        names, ranks = row[images_field], row[ranks_field]
        for name in names:
            if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(f"{where}: the path {name!r} leaves the data set's folder")
        if one_chosen:
            if not 0 <= ranks < len(names):
                raise UserError(f"{where}: human_preference {ranks} is no index of its {len(names)} images")
            ranks = [int(k != ranks) for k in range(len(names))]
        elif len(ranks) != len(names) or not all(isinstance(r, (int, float)) for r in ranks):
            raise UserError(f"{where}: field {ranks_field!r} should have a number for each of the {len(names)} images")
        elif ranks_field == "human_preference":
            ranks = [-r for r in ranks]  # there the preferred one has the larger number
        first_of_id = ids.setdefault(row["id"], i) if isinstance(row.get("id"), (int, str)) else i
        reason = None
        if first_of_id != i:
            reason = f"has the id {row['id']} of element {first_of_id}"
        elif len(names) < 2:
            reason = "a choice needs two images"
        if reason:
            dropped.append({"item": where, "stage": "read", "reason": reason})
        else:
            named = row.get("contain_name") if isinstance(row.get("contain_name"), bool) else None
            choices.append(Choice(where, row["prompt"], names, ranks, contain_name=named))

    # Where the pictures lie: the first one that is found decides for all.
    folders = [image_folder] if image_folder else [path.parent / folder, path.parent]
    found = (f for choice in choices for name in choice.images for f in folders if (f / name).is_file())
    image_folder = next(found, folders[0])
    for choice in choices:
        choice.images = [image_folder / name for name in choice.images]
    return choices


def read_pickapic(path: Path, dropped: list[dict]) -> list[Choice]:
    import pyarrow
    import pyarrow.parquet as pq

    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        file = pq.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a parquet file: {str(error).splitlines()[0]}") from None
    missing = [c for c in ("caption", "jpg_0", "jpg_1", "label_0", "label_1") if c not in file.schema_arrow.names]
    if missing:
        raise UserError(f"{path}: no column {', '.join(missing)}, so not Pick-a-Pic's format")
    columns = [c for c in ("caption", "label_0", "label_1", "has_label") if c in file.schema_arrow.names]
    choices, number = [], 0
    for group in range(file.num_row_groups):
        for row, values in enumerate(file.read_row_group(group, columns).to_pylist()):
            where, labels = f"{path}: row {number}", (values["label_0"], values["label_1"])
            number += 1
            if values.get("has_label") is False:
                dropped.append({"item": where, "stage": "read", "reason": "it has no label"})
                continue
            if labels not in ((0, 1), (1, 0), (0.5, 0.5)) or not isinstance(values["caption"], str):
                raise UserError(f"{where}: caption {values['caption']!r}, labels {labels}: not Pick-a-Pic's format")
            images = [Cell(str(path), group, row, column) for column in ("jpg_0", "jpg_1")]
            choices.append(Choice(where, values["caption"], images, [-label for label in labels], ties_count=True))
    return choices


def open_choice(image):
    """Decode one of a choice's images; ValueError saying why that is not possible."""
    if not isinstance(image, Cell):
        return open_image(image)
    cell = read_pictures(image.path, image.group)[image.column][image.row].as_py()
    content = cell.get("bytes") if isinstance(cell, dict) else cell  # some copies of the data set wrap the bytes
    if not content:
        raise ValueError("there is no picture in it")
    return open_image(io.BytesIO(content))


@lru_cache(maxsize=1)
def read_pictures(path: str, group: int):
    """Return the pictures of a row group; they are read in turn, so one group at a time is kept."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(path).read_row_group(group, ["jpg_0", "jpg_1"])


def why_unusable(choice: Choice) -> str | None:
    """Return which of the pictures is missing or broken and how, or None."""
    for image in choice.images:
        try:
            open_choice(image)
        except ValueError as error:
            return f"{image.name}: {error}"
    return None


# --- scores ---


def score(choices: list[Choice], scorer, batch_size: int, num_workers: int, show: bool = True) -> Iterator[tuple]:
    """Yield (scores, None) for each choice in turn, or (None, reason) if one of its pictures cannot be decoded.

    Scores are HPS, 100 * cosine, one for each picture. Every prompt is encoded once; batches run across prompts.
    """
    import torch

    from utils.hps import pair_scores

    if not choices:
        return
    prompts = list(dict.fromkeys(choice.prompt for choice in choices))
    encoded = dict(zip(prompts, scorer.encode_prompts(prompts), strict=True))
    images = [image for choice in choices for image in choice.images]
    features, reasons = [], []
    with closing(scoring.encode_pictures(scorer, images, open_choice, batch_size, num_workers, show)) as batches:
        for choice in choices:
            n = len(choice.images)
            while len(reasons) < n:
                encoded_images, batch_reasons = next(batches)
                good = iter(encoded_images)
                features += [None if reason else next(good) for reason in batch_reasons]
                reasons += batch_reasons
            wrong = [f"{image.name}: {why}" for image, why in zip(choice.images, reasons[:n], strict=False) if why]
            if wrong:
                yield None, wrong[0]
            else:
                scores = pair_scores(torch.stack(features[:n]), encoded[choice.prompt]).tolist()
                if not np.isfinite(scores).all():
                    raise UserError("the scores are no numbers; is the checkpoint sound, and --precision enough?")
                yield scores, None
            del features[:n], reasons[:n]


def agreement(scores: list[float], choice: Choice) -> tuple[float, float, int]:
    """Return (top-1, pairs in people's order, pairs that people ordered) of the scores of a choice's images.

    Top-1 is 1 if the highest score is the image that people liked best. Where several share the first place, in the
    scores or in people's ranks, it is the expectation over drawing one of each: chance is 1/n for n images, ties or no.
    A pair of equal scores counts half.
    """
    scores, ranks = np.asarray(scores), np.asarray(choice.ranks)
    tops, best = scores == scores.max(), ranks == ranks.min()
    top1 = (tops & best).sum() / (tops.sum() * best.sum())
    i, j = np.triu_indices(len(ranks), 1)
    same_order = 0.5 + 0.5 * np.sign(scores[i] - scores[j]) * np.sign(ranks[j] - ranks[i])
    counted = np.full(len(i), True) if choice.ties_count else ranks[i] != ranks[j]
    return float(top1), float(same_order[counted].sum()), int(counted.sum())
