"""A cache of the VAE's posterior on disk, so that training decodes and encodes every crop once.

    FOLDER/contents.jsonl                       checksums of the picture files, remembered by path, size and time
    FOLDER/{VAE}-{resolution}/latents.f16       memory-mapped float16 (n, 2, channels, height, width): mean and log-variance
    FOLDER/{VAE}-{resolution}/state.u8          memory-mapped uint8 (n,): 0 missing, 1 there, 2 the picture cannot be decoded
    FOLDER/{VAE}-{resolution}/keys.jsonl        line i names entry i: a checksum of the picture's content and the crop

Sampling the posterior stays with the training step. At 512 px an entry takes 64 KiB: 17 GB for the paper's 258,911
pictures, times --crops_per_image. A killed run goes on; several runs may share a folder: one fills it, the others wait.
"""

import errno
import fcntl
import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils import training_pictures
from utils.errors import UserError
from utils.jsonl import Appender, read
from utils.main_process import on_main
from utils.runs import sha256

# What is encoded together is fixed, since a batch's composition shows in the last bits: neither the number of processes
# nor a restart changes an entry.
GROUP = 16
MISSING, THERE, BROKEN = 0, 1, 2


def fingerprint(*modules: torch.nn.Module) -> str:
    """Return a checksum of the modules' weights: the names, shapes and types of all, and 1,000 values of each."""
    checksum = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            checksum.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            values = tensor.flatten()[:: max(1, tensor.numel() // 1000)]
            checksum.update(values.float().cpu().numpy().tobytes())
    return checksum.hexdigest()[:16]


@torch.no_grad()
def encode_pixels(vae, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and log-variance of the posterior of pixels, uint8 (n, 3, h, w)."""
    posterior = vae.encode((pixels.float() / 127.5 - 1).to(vae.dtype)).latent_dist
    return posterior.mean, posterior.logvar


class LatentCache:
    """The entries for the rows of one training: crop `epoch % crops` of each picture."""

    def __init__(self, rows: list[dict], args, vae, latent_shape: tuple[int, int, int]):
        self.rows, self.args = rows, args
        self.folder = Path(args.cache_latents) / f"{fingerprint(vae)}-{args.resolution}"
        self.shape = (2, *latent_shape)
        # Without a random crop or mirroring all crops are the same.
        self.crops = 1 if args.center_crop and not args.random_flip else args.crops_per_image

    def get(self, picture: int, epoch: int) -> dict | None:
        """Return `mean` and `logvar`, float16 (channels, height, width), or None if the picture cannot be decoded."""
        entry = self.entries[picture, epoch % self.crops]
        if self.state[entry] == BROKEN:
            return None
        mean, logvar = torch.from_numpy(np.array(self.latents[entry]))
        return {"mean": mean, "logvar": logvar}

    @contextmanager
    def lock(self):
        """Keep other runs out of the folder, or wait for the one that is in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder.parent / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another run that fills {self.folder.parent}")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def plan(self) -> np.ndarray:
        """Return each row's entries, int (rows, crops); those not yet there are to be filled. UserError if the disk is too small."""
        contents = self.contents()
        with Appender(self.folder / "keys.jsonl") as file:
            entry_of = {row["key"]: i for i, row in enumerate(read(self.folder / "keys.jsonl"))}
            wanted = [self.keys(row, contents) for row in self.rows]
            new = list(dict.fromkeys(key for keys in wanted for key in keys if key not in entry_of))
            size, free = 2 * int(np.prod(self.shape)), shutil.disk_usage(self.folder).free
            if size * len(new) > free:
                raise UserError(
                    f"--cache_latents {self.args.cache_latents}: {len(new)} more latents of {size} bytes take "
                    f"{size * len(new) / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there"
                )
            for key in new:
                entry_of[key] = len(entry_of)
                file.write({"key": key})
        for name, width in (("latents.f16", size), ("state.u8", 1)):
            with open(self.folder / name, "ab") as file:
                # Reserved now: a disk that fills up later would end a process that writes to mapped memory.
                try:
                    os.posix_fallocate(file.fileno(), 0, len(entry_of) * width)
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                        raise
                    os.truncate(file.fileno(), len(entry_of) * width)  # a file system that cannot reserve
        return np.array([[entry_of[key] for key in keys] for keys in wanted])

    def open(self, entries: np.ndarray):
        """Map the files. `entries`, int (rows, crops), is what `plan` returned to the main process."""
        self.entries = entries
        count = (self.folder / "state.u8").stat().st_size
        self.latents = np.memmap(self.folder / "latents.f16", np.float16, "r+", shape=(count, *self.shape))
        self.state = np.memmap(self.folder / "state.u8", np.uint8, "r+", shape=(count,))

    def __getstate__(self):
        """Leave the maps' content, gigabytes, out of what a worker of another start method than fork is sent."""
        return {name: value for name, value in vars(self).items() if name not in ("latents", "state")}

    def __setstate__(self, attributes):
        vars(self).update(attributes)
        self.open(self.entries)

    def fill(self, encode, rank: int, processes: int, workers: int, log: bool):
        """Encode what is missing, this process's share of it.

        `encode` takes pixels, uint8 (GROUP, 3, resolution, resolution), and returns mean and log-variance.
        """
        origin = {
            int(entry): (picture, crop)
            for picture, crops in enumerate(self.entries)
            for crop, entry in enumerate(crops)
        }
        # By number, since another process may have filled some of its own already.
        missing = {entry // GROUP for entry in origin if self.state[entry] == MISSING}
        groups = sorted(group for group in missing if group % processes == rank)
        groups = [[(e, *origin[e]) if e in origin else None for e in range(g * GROUP, (g + 1) * GROUP)] for g in groups]
        loader = DataLoader(groups, batch_size=None, num_workers=workers, collate_fn=self.decode)
        for entries, pixels, errors in tqdm(loader, "cache_latents", unit="group", disable=not log or not groups):
            mean, logvar = encode(pixels)
            both = torch.stack([mean, logvar], 1).half().cpu().numpy()
            for place, entry in entries.items():
                self.latents[entry] = both[place]
            self.latents.flush()  # an entry is marked only when it is on the disk
            for place, entry in entries.items():
                self.state[entry] = BROKEN if place in errors else THERE

    def log_broken(self):
        """Say which pictures could not be decoded."""
        for picture in np.unique(np.nonzero(self.state[self.entries] == BROKEN)[0]):
            training_pictures.log_broken(self.rows[picture], "not a readable picture", self.args.output_dir)

    def decode(self, group) -> tuple[dict[int, int], torch.Tensor, dict[int, str]]:
        """Return a group's entries by their place in it, the pixels, and why some of them could not be had."""
        side = self.args.resolution
        pixels, entries, errors = torch.zeros(GROUP, 3, side, side, dtype=torch.uint8), {}, {}
        for place, known in enumerate(group):
            if known is None:
                continue
            entry, picture, crop = known
            entries[place] = entry
            row = self.rows[picture]
            try:
                pixels[place] = training_pictures.cut(row, training_pictures.crop_of(row, crop, self.args), side)
            except ValueError as error:
                errors[place] = str(error)
        return entries, pixels, errors

    def keys(self, row: dict, contents: dict[str, str]) -> list[str]:
        """Return the names of a row's entries."""
        crops = (training_pictures.crop_of(row, crop, self.args) for crop in range(self.crops))
        return [hashlib.sha256(repr((contents[str(row["image"])], c)).encode()).hexdigest()[:32] for c in crops]

    def contents(self) -> dict[str, str]:
        """Return the checksum of every picture file by its path; a file is read again only if its size or time changed."""
        path = self.folder.parent / "contents.jsonl"
        with Appender(path) as file:
            known = {tuple(row["file"]): row["sha256"] for row in read(path)}
            files = {}
            for row in self.rows:
                stat = os.stat(row["image"])
                files[str(row["image"])] = (str(row["image"].resolve()), stat.st_size, stat.st_mtime_ns)
            new = [file for file in files.values() if file not in known]
            with ThreadPoolExecutor() as pool:
                checksums = pool.map(sha256, (name for name, *_ in new))
                for key, checksum in zip(
                    new, tqdm(checksums, "checksums", len(new), disable=len(new) < 10_000), strict=True
                ):
                    known[key] = checksum
                    file.write({"file": key, "sha256": checksum})
        return {image: known[key] for image, key in files.items()}


def fill_cache(rows: list[dict], args, vae, latent_shape, accelerator) -> LatentCache:
    """Return the latent cache with an entry for every row; the processes share the encoding."""
    cache = LatentCache(rows, args, vae, latent_shape)
    with cache.lock() if accelerator.is_main_process else nullcontext():
        cache.open(on_main(accelerator, cache.plan))
        cache.fill(
            lambda pixels: encode_pixels(vae, pixels.to(accelerator.device)),
            accelerator.process_index, accelerator.num_processes, args.dataloader_num_workers,
            accelerator.is_local_main_process,
        )  # fmt: skip
        accelerator.wait_for_everyone()
        cache.open(cache.entries)  # anew: on a network disk the old mapping may hold pages from before
    if (cache.state[cache.entries] == MISSING).any():
        raise UserError(f"--cache_latents {args.cache_latents}: what was written cannot be read back; use a local disk")
    if accelerator.is_main_process:
        cache.log_broken()
    return cache
