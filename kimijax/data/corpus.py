"""Real bytes as training text: the standard library and site-packages of this interpreter.

A file's side (train or held out) depends on its path inside the package alone, and no content is on
both sides, so held-out text is text the model has not seen wherever the environment is installed.
"""

import hashlib
import os
import re
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

Split = Literal["train", "held_out"]

MIN_BYTES = 256
MAX_BYTES = 1 << 20
HELD_OUT_ONE_IN = 5

# A root's own list of packages is never reached through another root: in a virtual environment the
# base interpreter's site-packages lies under its stdlib and is not part of this environment.
_SKIPPED_DIRS = {"__pycache__", "site-packages", "dist-packages"}
_PROJECT = {"kimijax", "kernels_pallas", "experiments"}
_VENDORED = re.compile(r"^.*/_?vendor(ed)?/")
_VERSION = re.compile(r"-(py)?\d[\w.+!]*?(?=-|\.dist-info|\.egg|$)")


@dataclass(frozen=True)
class SourceFile:
    """A file on disk and its key, the path inside the package root that decides its split."""

    path: Path
    key: str


def environment_roots() -> list[Path]:
    """The standard library and site-packages of the running interpreter, resolved, each once."""
    paths = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
    return list(dict.fromkeys(path.resolve() for path in paths if path.is_dir()))


def key_of(relative: str) -> str:
    """The key of a path relative to its root ("jax/_src/api.py").

    Versions in the first directory ("absl_py-2.5.1.dist-info") and the packages that vendor a copy
    ("pip/_vendor/rich/table.py") are left out, so that every version of a file has the same key.
    """
    top, slash, rest = relative.partition("/")
    key = _VERSION.sub("", top) + slash + rest if slash else top
    return _VENDORED.sub("", key)


def environment_files(
    suffixes: Sequence[str] = (".py",), roots: Sequence[Path] | None = None
) -> list[SourceFile]:
    """Every regular file below the roots that ends in one of `suffixes`, sorted by key.

    Left out: files under 256 bytes or over 1 MiB, symlinks, caches and this project itself.
    """
    roots = environment_roots() if roots is None else [Path(root).resolve() for root in roots]
    files = [
        SourceFile(path, key_of(path.relative_to(root).as_posix()))
        for root in dict.fromkeys(roots)
        for path in _walk(root, tuple(suffixes), set(roots) - {root})
    ]
    return sorted(files, key=lambda file: (file.key, file.path))


def split_of(key: str) -> Split:
    """The side of a key: one in five is held out, the same on every machine and Python."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return "held_out" if int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0 else "train"


def load_documents(
    split: Split, suffixes: Sequence[str] = (".py",), roots: Sequence[Path] | None = None
) -> list[bytes]:
    """The files of one split, sorted by key, each content once.

    A content that lies on both sides is a training document only. Unreadable files are left out.
    """
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}; must be one of {get_args(Split)}")
    sides: dict[str, list[SourceFile]] = {"train": [], "held_out": []}
    for file in environment_files(suffixes, roots):
        sides[split_of(file.key)].append(file)
    seen: set[bytes] = set()
    if split == "held_out":
        for _ in _unseen(sides["train"], seen):  # only its digests are kept
            pass
    return list(_unseen(sides[split], seen))


def concatenate(documents: Sequence[bytes], seed: int | None = None) -> np.ndarray:
    """The documents joined by newlines: uint8 [bytes]; in an order drawn from `seed` if given."""
    order: Iterable[int] = range(len(documents))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(len(documents))
    # A bytearray, because an array over bytes would be read-only.
    return np.frombuffer(bytearray(b"\n").join(documents[i] for i in order), np.uint8)


def _walk(root: Path, suffixes: tuple[str, ...], other_roots: set[Path]) -> Iterator[Path]:
    for directory, subdirs, names in os.walk(root):  # does not follow links to directories
        here = Path(directory)
        subdirs[:] = [
            name
            for name in subdirs
            if name not in _SKIPPED_DIRS
            and here / name not in other_roots
            and not (here == root and _is_project(name))
        ]
        for name in names:
            if not name.endswith(suffixes) or (here == root and _is_project(name)):
                continue
            try:
                status = os.lstat(here / name)
            except OSError:
                continue
            if stat.S_ISREG(status.st_mode) and MIN_BYTES <= status.st_size <= MAX_BYTES:
                yield here / name


def _is_project(top: str) -> bool:
    """Whether an entry of a root is this project: installed, its metadata, or an editable hook."""
    return top.startswith("__editable__") or re.split(r"[.-]", top, maxsplit=1)[0] in _PROJECT


def _unseen(files: Sequence[SourceFile], seen: set[bytes]) -> Iterator[bytes]:
    """The contents whose digests are not yet in `seen`, which grows by theirs."""
    for file in files:
        try:
            content = file.path.read_bytes()
        except OSError:
            continue
        digest = hashlib.blake2b(content, digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield content
