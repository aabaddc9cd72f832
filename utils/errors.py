"""A user's mistake ends with one line on stderr and exit code 2, never with a traceback."""

import errno
import sys
from contextlib import contextmanager

from tqdm import tqdm


class UserError(ValueError):
    """Something that only the user can mend; the message says what and where."""


@contextmanager
def one_line_errors():
    """Run a script's `main`: a UserError, an unusable path, a full disk or GPU becomes one line and exit code 2."""
    try:
        yield
    except UserError as error:
        message = str(error).rpartition("UserError: ")[2].strip()  # before it a DataLoader puts its worker's traceback
    except OSError as error:
        # Everything else the operating system may say is a defect of ours, and keeps its traceback.
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"{error.filename or 'output'}: {error.strerror}; what was written so far is intact"
        elif error.filename is not None and isinstance(
            error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
        ):
            message = f"{error.filename}: {error.strerror}"
        else:
            raise
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, by its name: not every script imports torch
            raise
        message = (
            f"{str(error).splitlines()[0]} A smaller batch takes less; in training so do --gradient_checkpointing, and the "
            "same steps in smaller pieces (--gradient_accumulation_steps, --micro_batch_size)"
        )
    else:
        return
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # so that the message stands on a line of its own
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
