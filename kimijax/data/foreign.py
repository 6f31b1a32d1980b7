"""Foreign files and libraries: read within limits; what they stumble over is said in one line."""

import contextlib
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from kimijax.errors import UserError

CONFIG = "tokenizer_config.json"
MAX_FILE = 256 << 20  # bytes


def need(module: str, purpose: str, extra: str = "text") -> ModuleType:
    """A library of an extra, imported only where it is used; UserError where it lacks."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{purpose} needs {module}, which cannot be imported: pip install kimijax[{extra}]"
        ) from error


@contextlib.contextmanager
def refusing(what: str, remedy: str) -> Iterator[None]:
    """Whatever foreign code stumbles over becomes a UserError: one line, what, fault and remedy."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception
        fault = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{what}: {fault}; {remedy}") from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the disk refuses becomes a UserError: one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}; make room, or name "
                        "another place") from error


def read_file(path: Path, limit: int = MAX_FILE) -> bytes:
    try:
        if (size := path.stat().st_size) > limit:
            raise UserError(f"{path}: has {size} bytes; at most {limit} are read")
        if not path.is_file():
            raise UserError(f"{path}: is no regular file")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def read_object(path: Path) -> dict:
    """A JSON object; empty where there is no such file."""
    if not os.path.lexists(path):
        return {}
    content = read_file(path)
    with refusing(f"{path}: cannot be read as JSON", "fetch it again"):
        data = json.loads(content.decode("utf-8"))
    if not isinstance(data, dict):
        raise UserError(f"{path}: must be a JSON object, not a {type(data).__name__}")
    return data


def is_id(i: object, limit: int) -> bool:
    return isinstance(i, int) and not isinstance(i, bool) and 0 <= i < limit
