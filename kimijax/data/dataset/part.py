"""What a worker makes of a part: one file of tokens and of what they are."""

import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from kimijax.data.dataset.format import dtype_of
from kimijax.data.documents.inputs import Part, Unit
from kimijax.data.documents.read import Document, Fields, documents, place
from kimijax.data.foreign import writing
from kimijax.data.tokenizer import Tokenizer
from kimijax.errors import UserError

BATCH_BYTES, BATCH_DOCUMENTS = 1 << 20, 4096
BadLines = Literal["fail", "skip"]


class Encoded(NamedTuple):
    """Documents, or pieces of them, in order; n of them."""

    tokens: np.ndarray
    lengths: np.ndarray  # n int64, tokens of each
    bytes: np.ndarray  # n int64, of its text
    language: np.ndarray  # n int32, index into `languages`
    joined: np.ndarray  # n bool, goes on with the one before it
    bad: np.ndarray  # n bool, left out
    languages: np.ndarray  # uint8, a JSON list of names


@dataclass(frozen=True, kw_only=True)
class Options:
    """What decides the tokens besides inputs and tokenizer."""

    fields: Fields = Fields()
    bad_lines: BadLines = "fail"


def encode_part(part: Part, tokenizer: Tokenizer, options: Options) -> Encoded:
    """The tokens of a part, an eos behind each document if the tokenizer has one."""
    found, ids, languages = [], [], {}
    eos = np.array(tokenizer.eos[:1], np.uint32)
    for unit in part.units:
        for batch in _batches(documents(unit, options.fields)):
            for document, tokens in zip(batch, _encode(unit, batch, tokenizer, options),
                                        strict=True):
                bad = tokens is None
                tokens = np.zeros(0, np.uint32) if tokens is None else tokens
                if not document.open and not bad and (tokens.size or document.joined):
                    tokens = np.concatenate([tokens, eos])
                language = languages.setdefault(document.language, len(languages))
                size = len(document.text.encode("utf-8", "surrogatepass"))
                found.append((len(tokens), size, language, document.joined, bad))
                ids.append(tokens.astype(dtype_of(tokenizer.vocab)))
    columns = zip(*found, strict=True) if found else ((),) * 5
    dtypes = (np.int64, np.int64, np.int32, np.bool_, np.bool_)
    arrays = [np.array(x, t) for x, t in zip(columns, dtypes, strict=True)]
    tokens = np.concatenate([np.zeros(0, dtype_of(tokenizer.vocab)), *ids])
    return Encoded(tokens, *arrays, np.frombuffer(json.dumps([*languages]).encode(), np.uint8))


def save_part(path: Path, encoded: Encoded) -> None:
    """Write a part; it reaches the disk before it takes its name."""
    # Named by process: one whose parent was killed may still be writing the same.
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with writing(path), temporary.open("wb") as file:
        np.savez(file, **encoded._asdict())
        file.flush()
        os.fsync(file.fileno())
        temporary.replace(path)


def load_part(path: Path, *names: str) -> tuple[np.ndarray, ...]:
    """Arrays of a part by name; UserError: the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return tuple(arrays[name] for name in names)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: is damaged: {error}; remove it, and it is made again") from error


def _batches(found: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about BATCH_BYTES."""
    while batch := list(islice(found, 1)):
        size = len(batch[0].text)
        while size < BATCH_BYTES and len(batch) < BATCH_DOCUMENTS and (more := next(found, None)):
            batch.append(more)
            size += len(more.text)
        yield batch


def _encode(
    unit: Unit, batch: Sequence[Document], tokenizer: Tokenizer, options: Options
) -> list[np.ndarray | None]:
    """The tokens of each document; None: it is left out. UserError names the faulty one."""
    try:
        ids = tokenizer.encode_batch([document.text for document in batch])
        faults = [document.fault for document in batch]
    except UserError:  # each alone says which it is
        ids, faults = zip(*(_encode_one(document, tokenizer) for document in batch), strict=True)
    for document, fault in zip(batch, faults, strict=True):
        if fault and options.bad_lines == "fail":
            raise UserError(f"{place(unit, document)} {fault}; mend it, or leave such documents "
                            "out with --bad_lines skip")
    return [None if fault else x for x, fault in zip(ids, faults, strict=True)]


def _encode_one(document: Document, tokenizer: Tokenizer) -> tuple[np.ndarray | None, str | None]:
    try:
        return tokenizer.encode_batch([document.text])[0], document.fault
    except UserError as error:
        return None, f"cannot be encoded: {error}"
