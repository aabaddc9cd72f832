"""DiffusionDB's parts: where they live, and their rows, read straight out of the zips.

A part is a zip of about 1,000 images and one JSON at its root, {image: {"p": prompt, ...}}, in whose key order its rows
come. `poloclub/diffusiondb` on the hub has 2,000 parts of "2m" (PNG, 0.8 GB each) and 14,000 of "large" (lossless WebP,
0.46 GB each). What users type as `--source_dataset` (SOURCES below) becomes a list of parts.

Nothing in a zip is trusted: only root members that the JSON names are read, and sizes are bounded. What cannot be read is a
ValueError saying why; rows that make no sense come back as values, beside the good ones.
"""

import errno
import json
import os
import re
from pathlib import Path
from typing import NamedTuple
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

from utils import hub
from utils.errors import UserError

REPOSITORY = "poloclub/diffusiondb"
PARTS = {"2m": 2000, "large": 14000}
SOURCES = (
    "large_first_1m, 2m_first_1k and the like, large_all, 2m_all, large:2-1001, or a folder of part-000002.zip ..."
)

MAX_ROWS = 1_000_000  # of a part, so that part * MAX_ROWS + position is an id for ever
MAX_JSON_BYTES = 256 << 20
MAX_IMAGE_BYTES = 64 << 20
MAX_NAME_BYTES = 128


# What a disk or its network answers at a bad moment.
FAULTS = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT)


class ReadFault(ValueError):
    """A zip that could not be read now, and may be another time."""


class Part(NamedTuple):
    number: int
    path: str  # a local file, or a file of the hub's repository
    on_hub: bool

    @property
    def name(self) -> str:
        return Path(self.path).name


class Row(NamedTuple):
    id: int
    image: str
    prompt: str


# --- where parts live ---


def find_parts(source: str) -> list[Part]:
    """Return the parts of a local folder or of one of the hub's subsets, in the order of their numbers.

    The hub's own loader starts `*_first_*` at part 2, and so do we: `large_first_1m` is parts 2 .. 1001.
    """
    if Path(source).is_dir():
        return local_parts(Path(source))
    name = str(source).lower()
    if match := re.fullmatch(r"(2m|large)_first_(\d+)(k|m)", name):
        first, last = 2, 1 + int(match[2]) * {"k": 1, "m": 1000}[match[3]]
    elif match := re.fullmatch(r"(2m|large)_all", name):
        first, last = 1, PARTS[match[1]]
    elif match := re.fullmatch(r"(2m|large):(\d+)(?:-(\d+))?", name):
        first, last = int(match[2]), int(match[3] or match[2])
    elif re.fullmatch(r"(2m|large)_random_\w+", name):
        raise UserError(f"--source_dataset {source}: a random subset is another one each time; name a range of parts")
    else:
        raise UserError(f"--source_dataset {source}: neither a folder nor a subset ({SOURCES})")
    if not 1 <= first <= last <= PARTS[match[1]]:
        raise UserError(
            f"--source_dataset {source}: {match[1]} has parts 1 to {PARTS[match[1]]}, not {first} to {last}"
        )
    return [Part(number, hub_path(match[1], number), True) for number in range(first, last + 1)]


def name_source(source: str) -> str:
    """Return a source's name as records hold it: the same for each way to write it."""
    return str(Path(source).resolve()) if Path(source).is_dir() else str(source).lower()


def hub_path(collection: str, number: int) -> str:
    """Return where a part lies in the hub's repository."""
    if collection == "2m":
        return f"images/part-{number:06d}.zip"
    return f"diffusiondb-large-part-{1 if number <= 10000 else 2}/part-{number:06d}.zip"


def local_parts(folder: Path) -> list[Part]:
    """Return the part zips of a folder; each has its number at the end of its name, as the hub's have."""
    found = {}
    for path in sorted(folder.glob("*.zip")):
        match = re.search(r"(\d{1,9})$", path.stem, re.ASCII)
        if not match:
            raise UserError(f"{path}: not named like part-000002.zip")
        if other := found.get(int(match[1])):
            raise UserError(f"{path}: has the same number as {other.name}")
        found[int(match[1])] = Part(int(match[1]), str(path), False)
    if not found:
        raise UserError(f"{folder}: no part zips in it")
    return [found[number] for number in sorted(found)]


def cached(part: Part, cache_dir: str | None = None) -> str | None:
    """Return the path of a part's zip if it is on this machine."""
    return hub.cached(REPOSITORY, part.path, cache_dir) if part.on_hub else part.path


def fetch(part: Part, cache_dir: str | None = None) -> str:
    """Return the path of a part's zip on this machine; the hub's are downloaded first (see `hub.download`)."""
    return hub.download(REPOSITORY, part.path, cache_dir) if part.on_hub else part.path


# --- what is in them ---


def open_part(path: str | hub.RangeFile) -> ZipFile:
    """Open a part's zip; ValueError if it is none."""
    try:
        return ZipFile(path)
    except UserError:
        raise
    except Exception as error:  # a damaged directory of members makes zipfile raise nearly anything
        kind = ReadFault if getattr(error, "errno", None) in FAULTS else ValueError
        raise kind(f"not a readable zip: {reason(error)}") from None


def open_part_anywhere(part: Part, cache_dir: str | None = None) -> ZipFile:
    """Open a part's zip: on this machine if it is there, else on the hub, read by range requests."""
    if path := cached(part, cache_dir):
        return open_part(path)
    file = hub.RangeFile(REPOSITORY, part.path)
    archive = open_part(file)
    file.boundaries = sorted(info.header_offset for info in archive.infolist()) + [archive.start_dir]
    return archive


def read_rows(archive: ZipFile, number: int) -> tuple[list[Row], list[tuple[str, str]]]:
    """Return a part's rows in its JSON's key order, and (image, reason) for each entry that is no row.

    Members that the JSON does not name are counted in one last reason, without an image. ValueError if there is no JSON.
    """
    members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
    index_name = find_index(archive, members)
    content = read_member(archive, index_name, MAX_JSON_BYTES)
    try:
        # Bytes that are no UTF-8 become lone surrogates, which only their own row then fails on.
        index = json.loads(content.decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{index_name}: not valid JSON: {reason(error)}") from None
    if not isinstance(index, dict) or len(index) > MAX_ROWS:
        raise ValueError(f"{index_name}: not an object of at most {MAX_ROWS} images")
    rows, problems = [], []
    for position, (image, entry) in enumerate(index.items()):
        prompt = entry.get("p") if isinstance(entry, dict) else None
        if not is_image_name(image):
            problems.append((printable(image), "not a plain file name"))
        elif image not in members:
            problems.append((image, f"named in {index_name}, absent from the zip"))
        elif not isinstance(prompt, str):
            problems.append((image, f"no prompt in {index_name}"))
        elif printable(prompt) != prompt:
            problems.append((image, f"its prompt in {index_name} is not valid UTF-8"))
        else:
            rows.append(Row(number * MAX_ROWS + position, image, prompt))
    if unnamed := len(members.keys() - index.keys() - {index_name}):
        problems.append(("", f"{unnamed} members of the zip are not named in {index_name}"))
    return rows, problems


def find_index(archive: ZipFile, members) -> str:
    """Return the name of the JSON that lists a part's images: the zip's own name, or the only one at the root."""
    own = Path(os.fspath(archive.filename)).stem + ".json"
    others = [name for name in members if name.endswith(".json") and is_image_name(name)]
    if own in members:
        return own
    if len(others) != 1:
        raise ValueError(f"no {own} in the zip")
    return others[0]


def read_image(archive: ZipFile, image: str) -> bytes:
    """Return an image's file; ValueError if that cannot be had."""
    if not is_image_name(image):
        raise ValueError("not a plain file name")
    return read_member(archive, image, MAX_IMAGE_BYTES)


def read_member(archive: ZipFile, name: str, limit: int) -> bytes:
    try:
        member = archive.getinfo(name)
    except KeyError:
        raise ValueError("absent from the zip") from None
    if member.file_size > limit:
        raise ValueError(f"{name}: declares {member.file_size} bytes, more than {limit}")
    if member.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        raise ValueError(f"{name}: in an unusual compression, which nothing bounds")
    try:
        with archive.open(member) as file:
            return file.read(member.file_size)  # a bare read() would unpack all that a lying member holds
    except UserError:
        raise
    except Exception as error:  # damaged, encrypted, cut short: each raises its own
        kind = ReadFault if getattr(error, "errno", None) in FAULTS else ValueError
        raise kind(f"not readable in the zip: {reason(error)}") from None


def is_image_name(name: str) -> bool:
    """Whether it is a file name without a folder, fit to name a file of ours too."""
    plain = name.isprintable() and "/" not in name and "\\" not in name and name not in ("", ".", "..")
    return plain and len(name.encode()) <= MAX_NAME_BYTES


def printable(text: str) -> str:
    """Return the text with a question mark for what UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()


def reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
