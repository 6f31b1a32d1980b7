"""The documents of a unit: lines of JSONL, rows of Parquet, or a text."""

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from kimijax.data.documents.inputs import Unit, open_parquet
from kimijax.data.documents.text import pieces
from kimijax.data.foreign import refusing
from kimijax.errors import UserError

MAX_LINE = 256 << 20  # bytes
ROWS = 256  # of Parquet, read at once


class Document(NamedTuple):
    """A document or a piece of one. `fault` says why there is none."""

    text: str
    at: int  # line of the file from 1, row of the row group from 0, piece of the text from 0
    language: str = ""
    joined: bool = False  # goes on with the document before it
    open: bool = False  # the next one goes on with it
    fault: str | None = None


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Where text and language stand in a JSON object or a row; no language field is no fault."""

    text: str = "text"
    language: str = "lang"


def documents(unit: Unit, fields: Fields) -> Iterator[Document]:
    """The documents of a unit, faulty ones included; UserError: the file itself cannot be read."""
    match unit.input.kind:
        case "parquet":
            yield from _rows(unit, fields)
        case "jsonl":
            with _opened(unit) as file:
                for at, line in _lines(file, unit):
                    yield _parsed(line, at, fields)
        case "text":
            with _opened(unit) as file:
                for i, content, joined, more in pieces(file, unit):
                    yield _decoded(content, i, joined, more)


def place(unit: Unit, document: Document) -> str:
    """Where a document stands, for a message."""
    x = unit.input
    if x.kind == "jsonl":
        return f"{x.path}: line {document.at + _lines_before(unit)}"
    if x.kind == "parquet":
        return f"{x.path}: row {document.at} of row group {unit.start}"
    return str(x.path)


@contextmanager
def _opened(unit: Unit) -> Iterator[BinaryIO]:
    path = unit.input.path
    try:
        with gzip.open(path, "rb") if unit.input.gzip else path.open("rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        fault = getattr(error, "strerror", None) or " ".join(str(error).split())[:300]
        raise UserError(f"{path}: cannot be read: {fault}; fetch it again") from error


def json_object(line: bytes) -> dict | str:
    """The object of a line, or what is wrong with it."""
    if len(line) > MAX_LINE:
        return f"has more than {MAX_LINE} bytes"
    try:
        value = json.loads(line.decode("utf-8"))
    except RecursionError:
        return "is nested too deep"
    except ValueError as error:
        return f"is not JSON ({' '.join(str(error).split())[:120]})"
    return value if isinstance(value, dict) else f"is not an object but {value!r:.60}"


def json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of a whole JSONL file that may be compressed, blank lines left out."""
    with refusing(f"{path}: cannot be read", "name a JSONL file"):
        opened = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
    with opened, refusing(f"{path}: cannot be read", "fetch it again"):
        yield from _bounded_lines(opened, None)


def _lines(file: BinaryIO, unit: Unit) -> Iterator[tuple[int, bytes]]:
    """(number within the unit from 1, line), blank lines left out."""
    if unit.start:  # the line that another unit began ends here, perhaps with nothing more
        file.seek(unit.start - 1)
        while not (line := file.readline(MAX_LINE)).endswith(b"\n"):
            if not line:
                return
    yield from _bounded_lines(file, None if unit.input.gzip else unit.stop)


def _bounded_lines(file: BinaryIO, stop: int | None) -> Iterator[tuple[int, bytes]]:
    number = 0
    while stop is None or file.tell() < stop:
        line = file.readline(MAX_LINE + 1)
        if not line:
            return
        number += 1
        end = line
        while len(end) > MAX_LINE and not end.endswith(b"\n"):  # too long: read past it
            end = file.readline(MAX_LINE + 1)
        if line.strip():
            yield number, line


def _lines_before(unit: Unit) -> int:
    """Lines of the file that begin before the unit's."""
    count, left, last = 0, unit.start, b"\n"
    with _opened(unit) as file:
        while left and (block := file.read(min(left, 1 << 20))):
            count, left, last = count + block.count(b"\n"), left - len(block), block
    return count + (not last.endswith(b"\n"))


def _parsed(line: bytes, at: int, fields: Fields) -> Document:
    value = json_object(line)
    if isinstance(value, str):
        return Document("", at, fault=value)
    if fields.text not in value:
        return Document("", at, fault=f"lacks the field {fields.text!r}")
    return _checked(value[fields.text], value.get(fields.language), at, fields)


def _checked(text: object, language: object, at: int, fields: Fields) -> Document:
    language = "" if language is None else language
    for name, value in ((fields.text, text), (fields.language, language)):
        if not isinstance(value, str):
            return Document("", at, fault=f"has {value!r:.60} as {name!r}, which must be text")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return Document("", at, fault=f"holds a lone surrogate in {name!r}")
    return Document(text, at, language)


def _decoded(content: bytes, at: int, joined: bool, more: bool) -> Document:
    try:
        return Document(content.decode("utf-8"), at, joined=joined, open=more)
    except UnicodeDecodeError as error:
        fault = f"is not UTF-8 ({error.reason}, byte {content[error.start]:#x})"
        return Document("", at, joined=joined, open=more, fault=fault)


def _rows(unit: Unit, fields: Fields) -> Iterator[Document]:
    path = unit.input.path
    with open_parquet(path) as file:
        names = file.schema_arrow.names
        if fields.text not in names:
            raise UserError(
                f"{path}: has no column {fields.text!r} but {', '.join(map(str, names))[:200]}; "
                "name one with --text_field"
            )
        columns = [name for name in (fields.text, fields.language) if name in names]
        with refusing(f"{path}: cannot be read", "fetch it again"):
            at = 0
            for batch in file.iter_batches(ROWS, [unit.start], columns, use_threads=False):
                for row in batch.to_pylist():
                    yield _checked(row[fields.text], row.get(fields.language), at, fields)
                    at += 1
