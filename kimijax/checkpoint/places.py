"""Where a run is kept: a directory of a file system, or gs://BUCKET/... of Cloud Storage.

A bucket is reached without a mount: arrays by orbax and tensorstore's own driver, other files by
etils.epath over gcsfs (the extra [bucket]). It holds objects alone, each whole once it is written;
a directory is a prefix of names, can be neither renamed nor removed at once, and no file is
appended to. So a checkpoint there is whole when its manifest is, which is written last and removed
first, and what grows is kept on a local disk and written anew.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kimijax.errors import UserError

BUCKET = "gs://"


def locate(path: str | os.PathLike) -> Path:
    """The path; of gs:// one of epath, which has the methods of pathlib's but for `absolute`.

    UserError: a bucket is named, and what reaches it is not installed.
    """
    text = os.fspath(path)
    if not text.startswith(BUCKET):
        return Path(text)
    import fsspec
    from etils import epath

    # A listing that is remembered lacks what tensorstore and other processes have written since.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    try:
        fsspec.get_filesystem_class("gcs")
    except ImportError as error:
        raise UserError(f"{text}: a bucket needs gcsfs: pip install 'kimijax[bucket]'") from error
    return epath.Path(text)


def absolute(path: str | os.PathLike) -> Path:
    """The path from the root on, as orbax wants it."""
    found = locate(path)
    return found if in_bucket(found) else found.absolute()


def in_bucket(path: Path) -> bool:
    """Whether it is of a bucket."""
    return not isinstance(path, Path)


def files(path: Path) -> dict[str, int]:
    """Sizes of all files below a directory, by name relative to it, sorted."""
    if not in_bucket(path):
        found = ((p.relative_to(path).as_posix(), p) for p in path.rglob("*") if p.is_file())
        return {name: p.stat().st_size for name, p in sorted(found)}
    import fsspec

    prefix = os.fspath(path).removeprefix(BUCKET)
    found = fsspec.filesystem("gcs").find(prefix, detail=True)  # a request for a thousand of them
    return {name[len(prefix) + 1 :]: found[name]["size"] for name in sorted(found)}


def remove(path: Path, first: str | None = None) -> None:
    """A directory and all in it, if it is there; of a bucket the file `first` before the others."""
    if not in_bucket(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    if first is not None:
        (path / first).unlink(missing_ok=True)
    path.rmtree(missing_ok=True)


@contextmanager
def local(path: Path) -> Iterator[Path]:
    """A local directory whose files are below `path` afterwards: itself, unless in a bucket."""
    if not in_bucket(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        upload(Path(folder), path)


def upload(folder: Path, path: Path) -> None:
    """Copy all files below a local directory to a bucket."""
    from etils import epath

    for name in files(folder):
        epath.Path(folder / name).copy(path / name, overwrite=True)
