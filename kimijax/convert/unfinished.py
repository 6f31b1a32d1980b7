"""What a killed writer of safetensors left: told from what one is writing now, and removed."""

import contextlib
import os
import re
from collections.abc import Collection, Iterator
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, flock
from pathlib import Path

WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


def remove_unfinished(directory: Path, beside: Collection[str]) -> bool:
    """Remove a directory of nothing but files that a killed writer left; whether it was one.

    beside  names that such a writer may have added. False, and nothing is touched: the directory
            holds anything else, or a writer is at work in it, or it cannot be told
    """
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        flock(handle, LOCK_EX | LOCK_NB)
        with os.scandir(handle) as entries:
            names = [x.name for x in entries if _unfinished(x, beside)]
        if not names or len(names) < len(os.listdir(handle)):
            return False
        for name in names:
            os.unlink(name, dir_fd=handle)
        directory.rmdir()
    except OSError:  # locked by a writer, or by none because the file system has no locks
        return False
    finally:
        os.close(handle)
    return True


def _unfinished(entry: os.DirEntry, beside: Collection[str]) -> bool:
    name = entry.name.removesuffix(".tmp")
    known = name in beside or WEIGHTS.fullmatch(name)
    return bool(known) and name != entry.name and entry.is_file(follow_symlinks=False)


@contextlib.contextmanager
def being_written(directory: Path) -> Iterator[None]:
    """So long `remove_unfinished` leaves the directory alone; a kill ends it, too."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: nothing is removed there
            flock(handle, LOCK_SH | LOCK_NB)
        yield
    finally:
        os.close(handle)
