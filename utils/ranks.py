"""Which of how many processes this is. Ranks share nothing but files, so no process group is needed to score or generate."""

import os

from utils.errors import UserError


def add_arguments(parser):
    """Add --world_size and --rank; by default they come from accelerate launch, torchrun or SLURM."""
    parser.add_argument("--world_size", type=int, help="number of processes (default: from the launcher)")
    parser.add_argument("--rank", type=int, help="which of them this is, from 0 (default: from the launcher)")


def rank_and_world_size(args) -> tuple[int, int]:
    """Return (rank, world size) from the flags, else from torchrun's variables, else from SLURM's, else (0, 1)."""
    found = (args.rank, args.world_size)
    if found == (None, None):
        for rank, world_size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
            if rank in os.environ and world_size in os.environ:
                found = (int(os.environ[rank]), int(os.environ[world_size]))
                break
        else:
            found = (0, 1)
    if None in found or not 0 <= found[0] < found[1]:
        raise UserError(f"--rank {found[0]} and --world_size {found[1]}: give both, and 0 <= rank < world size")
    return found


def device(name: str | None = None):
    """Return the torch device, the named one, else this process's GPU, else the CPU; a GPU becomes the current one."""
    import torch

    if name is None and torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
        name = f"cuda:{local % torch.cuda.device_count()}"
    try:
        found = torch.device(name or "cpu")
        if found.type == "cuda" and found.index is not None:
            torch.cuda.set_device(found)  # pinned memory, events and streams are the current device's
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return found
