"""Haystacks of real text, needles hidden in them, and needles found in a user's own files.

A token is a byte, so every position here is both a token index and a byte offset.
"""

import difflib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kimijax.data import corpus
from kimijax.errors import UserError

NEEDLE = " The pass key for {word} is {digits}. "
QUESTION = " What is the pass key for {word}? The pass key for {word} is "

LINE_REACH = 200  # bytes a needle may move forward to start a line
BINARY_PROBE = 8192
_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
_STATED = re.compile(
    (" ?" + NEEDLE.strip(" .")).format(word=r"(\S+)", digits=r"(\d+)").encode("ascii")
)


@dataclass(frozen=True)
class Needle:
    """One stated pass key. `depth` is the intended place in the context, 0 (start) to 1 (end)."""

    word: str
    digits: str
    depth: float
    position: int  # of the first byte of the needle text
    digits_position: int  # of the first digit


def read_haystack(
    path: str | None,
    split: corpus.Split = "held_out",
    *,
    seed: int = 0,
    limit: int | None = None,
) -> np.ndarray:
    """The text to hide needles in: uint8 [bytes], at most `limit` of them.

    `path` is a file, or a directory whose text files are joined in the order of their names; None
    is the environment's Python files of `split`, shuffled by `seed`. UserError if nothing is there.
    """
    if path is None:
        return corpus.concatenate(corpus.load_documents(split), seed)[:limit]
    if not path:  # Path("") would be the working directory
        raise UserError("the haystack's path is empty; name a text file or a directory")
    root = Path(os.path.expanduser(path))
    try:
        documents = _read_texts(root, limit)
    except FileNotFoundError as error:
        raise UserError(
            f"haystack {path}: {error.filename} does not exist; name a text file or a directory"
        ) from error
    except OSError as error:
        raise UserError(
            f"haystack {path}: cannot read {error.filename or path} ({error.strerror}); "
            "check its permissions or name another file or directory"
        ) from error
    if not documents:
        raise UserError(
            f"haystack {path}: no text in it (empty, binary and special files, links and hidden "
            "directories do not count); name a UTF-8 text file or a directory with some"
        )
    return corpus.concatenate(documents)[:limit]


def draw_words(rng: np.random.Generator, n: int, twins: bool = False) -> list[str]:
    """`n` distinct lowercase words of 4 to 8 letters.

    With `twins`, words 2i and 2i+1 differ in exactly one letter (an odd last word has no twin).
    """
    words: dict[str, None] = {}  # a set that keeps its order
    while len(words) < n:
        letters = rng.choice(_LETTERS, size=rng.integers(4, 9))
        word = letters.tobytes().decode("ascii")
        if word in words:
            continue
        words[word] = None
        if twins and len(words) < n:
            words[_draw_twin(rng, letters, words)] = None
    return list(words)


def draw_digits(rng: np.random.Generator, n: int) -> list[str]:
    """`n` distinct pass keys of five digits; UserError if there are not that many."""
    if n > 100_000:
        raise UserError(f"{n:,} needles, but only 100,000 keys have five digits; ask for fewer")
    return [f"{key:05d}" for key in rng.choice(100_000, size=n, replace=False)]


def hide(
    haystack: np.ndarray, context: int, words: Sequence[str], digits: Sequence[str]
) -> tuple[np.ndarray, list[Needle]]:
    """The start of `haystack` with a needle per word at evenly spaced depths, in the order given.

    Returns uint8 [context] and the needles; the first begins and the last ends the context, a
    single one is in the middle. UserError if the needles or the context are too many bytes.
    """
    texts = [
        NEEDLE.format(word=word, digits=key).encode()
        for word, key in zip(words, digits, strict=True)
    ]
    room = context - sum(map(len, texts))
    if room < 0:
        raise UserError(
            f"the {len(texts)} needles take {context - room:,} bytes, but the context is "
            f"{context:,}; ask for fewer needles or a longer context"
        )
    if len(haystack) < room:
        raise UserError(
            f"the haystack has {len(haystack):,} bytes, but a context of {context:,} needs {room:,}"
            f" beside the needles; add files or ask for at most {context - room + len(haystack):,}"
        )
    body = haystack[:room]
    depths = np.linspace(0.0, 1.0, len(texts)) if len(texts) > 1 else np.array([0.5])
    pieces, needles, start, length = [], [], 0, 0
    for word, key, text, depth in zip(words, digits, texts, depths, strict=False):
        end = _line_start(body, round(float(depth) * room))
        pieces += [body[start:end], np.frombuffer(text, np.uint8)]
        position = length + end - start
        digits_position = position + text.rindex(key.encode())
        needles.append(Needle(word, key, float(depth), position, digits_position))
        start, length = end, position + len(text)
    return np.concatenate([*pieces, body[start:]]), needles


def find_needle(tokens: np.ndarray, word: str) -> Needle:
    """The needle for `word` that is already written in `tokens` (uint8 [context]).

    If it is written more than once, the first. UserError if it is absent (with the nearest words
    that are there) or if two places state different digits.
    """
    found: dict[str, list[Needle]] = {}
    for match in _STATED.finditer(tokens.tobytes()):
        name, digits = (group.decode("utf-8", "replace") for group in match.groups())
        depth = match.start() / max(1, len(tokens) - (match.end() - match.start()))
        found.setdefault(name, []).append(
            Needle(name, digits, depth, match.start(), match.start(2))
        )
    if word not in found:
        raise UserError(_absent(word, sorted(found)))
    first = found[word][0]
    for other in found[word]:
        if other.digits != first.digits:
            raise UserError(
                f"the pass key for {word} is {first.digits} at byte {first.position:,} and "
                f"{other.digits} at byte {other.position:,}; keep one of them"
            )
    return first


def _read_texts(root: Path, limit: int | None) -> list[bytes]:
    """The texts at or below `root` in order, no further than `limit` bytes need; may raise OSError.

    Stops early because a user may point at far more than the context or the memory holds.
    """
    documents: list[bytes] = []
    size = 0
    for file in _regular_files(root):
        if limit is not None and size >= limit:
            break
        with file.open("rb") as stream:
            content = stream.read(-1 if limit is None else max(BINARY_PROBE, limit - size))
        if content and b"\0" not in content[:BINARY_PROBE]:
            documents.append(content)
            size += len(content)
    return documents


def _regular_files(root: Path) -> Iterator[Path]:
    if not root.is_dir():
        if stat.S_ISREG(root.stat().st_mode):
            yield root
        return
    files: list[Path] = []
    for directory, subdirs, names in os.walk(root, onerror=_raise):  # follows no links
        subdirs[:] = [name for name in subdirs if not name.startswith(".")]
        files += (Path(directory, name) for name in names)
    yield from (file for file in sorted(files) if stat.S_ISREG(file.lstat().st_mode))


def _raise(error: OSError) -> None:
    raise error


def _draw_twin(rng: np.random.Generator, letters: np.ndarray, taken: dict[str, None]) -> str:
    while True:
        twin = letters.copy()
        place = rng.integers(len(twin))
        twin[place] = rng.choice(_LETTERS[letters[place] != _LETTERS])
        word = twin.tobytes().decode("ascii")
        if word not in taken:
            return word


def _line_start(body: np.ndarray, offset: int) -> int:
    """The first line start at most LINE_REACH bytes after `offset`, or `offset` if none is."""
    if offset == 0 or offset == len(body):
        return offset
    newlines = np.flatnonzero(body[offset - 1 : offset + LINE_REACH] == ord("\n"))
    return offset + int(newlines[0]) if newlines.size else offset


def _absent(word: str, found: list[str]) -> str:
    form = NEEDLE.strip().format(word=word, digits="<5 digits>")
    if not found:
        return f'no pass key for {word}: no line says "{form}"; add one or ask for another word'
    near = difflib.get_close_matches(word, found, n=3, cutoff=0.6) or found[:3]
    return f'no pass key for {word}: "{form}" is not there; the nearest words: {", ".join(near)}'
