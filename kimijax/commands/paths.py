"""Paths on the command line, refused before any work where no system call can take them."""

import os
import tempfile
from pathlib import Path

from kimijax.errors import UserError


def path(text: str) -> str:
    """`type=` of a path argument, which need not exist; UserError for one that never can."""
    if not text:
        raise UserError("a path is empty: name a file or a directory")
    try:
        os.stat(text)
    except (FileNotFoundError, NotADirectoryError):
        pass  # whether it must exist is for the command to say
    except OSError as error:
        raise UserError(
            f"{text!r:.200}: cannot be reached: {error.strerror}; name another path"
        ) from error
    except ValueError as error:  # a NUL, or a character that file names here cannot hold
        raise UserError(f"{text!r:.200}: is no path: {error}; name another") from error
    return text


def writable(out: str, bucket: bool = False) -> Path:
    """The output directory, not made yet; UserError if it could not be made or written.

    bucket  it may be one, gs://...; a command that is of no use there refuses it
    """
    if out.startswith("gs://"):
        return _writable_bucket(out, bucket)
    try:
        path = Path(out or "/dev/null").expanduser()
        nearest = path
        while not nearest.exists():
            nearest = nearest.parent
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"--out {out or repr(out)} cannot be written: {why}") from error
    return path


def _writable_bucket(out: str, bucket: bool) -> Path:
    if not bucket:
        raise UserError(f"--out {out} is in a bucket; this command writes to a file system: give "
                        "it a path, of a mount if need be")
    from kimijax.checkpoint.places import locate

    path = locate(out)
    probe = path / ".writable"
    try:
        probe.write_text("")
        probe.unlink()
    except Exception as error:  # gcsfs has its own for what a bucket refuses
        raise UserError(f"--out {out} cannot be written: {error}"[:400]) from error
    return path
