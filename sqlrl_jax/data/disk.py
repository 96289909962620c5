"""Room on the disk: asked for before anything long starts, and said in one sentence when it runs out all the same."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rollout.errors import UserError
from sqlrl_jax.data.progress import size


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raises UserError when the disk of `folder` (which need not exist yet) has fewer than `needed` bytes free."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{folder}: {what} needs {size(needed)}, and the disk has {size(free)} free; "
            "free some space or choose a folder on another disk"
        )


@contextmanager
def disk_errors(path: Path, kind: type[UserError]) -> Iterator[None]:
    """Turns the operating system's refusals into `kind`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise kind(f"{path}: the disk is full; free some space and run again to continue") from None
        raise kind(f"{path}: can't be written ({error.strerror or error})") from None
