"""What a dataset directory holds: dataset.json and four arrays.

  dataset.json   Info
  tokens/        [tokens] uint16 or uint32, documents one after the other
  ends/          [documents] int64, where each ends
  source/        [documents] uint16, index into Info.sources
  language/      [documents] uint16, index into Info.languages

The arrays are zarr3 in shards of SHARD numbers, whose chunks of CHUNK are read alone and carry a
checksum.
"""

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from kimijax.data.foreign import is_id, need, read_object, refusing
from kimijax.errors import UserError

INFO, VERSION = "dataset.json", 1
TOKENS, ENDS, SOURCE, LANGUAGE = "tokens", "ends", "source", "language"
SHARD, CHUNK = 1 << 24, 1 << 14
MAX_COUNT = 1 << 48
MAX_NAMES = 1 << 16
AGAIN = "make it anew with kimijax tokenize"


@dataclass(frozen=True, kw_only=True)
class Count:
    """What one source or language contributes; bytes are those of the text in UTF-8."""

    name: str
    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Info:
    """What dataset.json says. eos ends every document; None: the tokenizer has none."""

    vocab: int
    dtype: str
    tokenizer: str
    digest: str  # of the tokenizer
    eos: int | None
    documents: int
    tokens: int
    empty: int  # documents that were dropped, having no tokens
    bad: int  # lines and texts that were left out
    sources: tuple[Count, ...]
    languages: tuple[Count, ...]


def dtype_of(vocab: int) -> str:
    """The narrowest dtype of ids below `vocab`."""
    return "uint16" if vocab <= 1 << 16 else "uint32"


def shapes(info: Info) -> dict[str, tuple[int, str]]:
    """Name -> length and dtype of the arrays."""
    return {
        TOKENS: (info.tokens, info.dtype), ENDS: (info.documents, "int64"),
        SOURCE: (info.documents, "uint16"), LANGUAGE: (info.documents, "uint16"),
    }


def write_info(directory: Path, info: Info) -> None:
    """Write dataset.json, complete before it takes its name."""
    temporary = directory / f"{INFO}.tmp"
    temporary.write_text(json.dumps({"version": VERSION} | asdict(info), indent=1) + "\n")
    temporary.replace(directory / INFO)


def read_info(directory: Path) -> Info:
    """The Info of a directory; UserError: there is none, or it contradicts itself."""
    path = directory / INFO
    if not path.exists():
        raise UserError(f"{directory}: is no dataset, it has no {INFO}; make one with kimijax "
                        "tokenize")
    data = read_object(path)
    if data.pop("version", None) != VERSION:
        raise UserError(f"{path}: is not of format version {VERSION}; {AGAIN}")
    with refusing(f"{path}: is no description of a dataset", AGAIN):
        data |= {name: tuple(Count(**x) for x in data[name]) for name in ("sources", "languages")}
        info = Info(**data)
    if fault := _fault(info):
        raise UserError(f"{path}: {fault}; {AGAIN}")
    return info


def open_array(directory: Path, name: str, length: int, dtype: str, create: bool = False):
    """The open tensorstore of an array; UserError: it is missing, shorter or of another kind."""
    tensorstore = need("tensorstore", f"{directory}: a dataset", "train")
    path = directory / name
    if not create:
        found = sum(x.stat().st_size for x in path.glob("c/*") if x.is_file())
        if found < length * np.dtype(dtype).itemsize:  # before memory is taken for it
            raise UserError(f"{path}: has {found} bytes, too few for {length} numbers of {dtype}; "
                            f"{AGAIN}")
    with refusing(f"{path}: cannot be {'written' if create else 'read'}",
                  "name another place" if create else AGAIN):
        return tensorstore.open(
            _spec(path, length, dtype), create=create, open=not create, read=True, write=create
        ).result()


def _spec(path: Path, length: int, dtype: str) -> dict:
    plain = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{os.path.abspath(path)}/"},
        "metadata": {
            "shape": [length],
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARD]}},
            "codecs": [{
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [CHUNK], "codecs": plain, "index_codecs": plain,
                },
            }],
        },
        "fill_missing_data_reads": False,  # a missing file is no run of zeros
        "store_data_equal_to_fill_value": True,
        # Neighbouring documents share chunks.
        "context": {"cache_pool": {"total_bytes_limit": 1 << 26}},
        "recheck_cached_data": False,
    }


def _fault(info: Info) -> str | None:
    counts = {f.name: getattr(info, f.name) for f in fields(info) if f.type is int}
    for name, value in counts.items():
        if not is_id(value, MAX_COUNT):
            return f"{name} is {value!r:.40}, must be a number from 0 to 2^48"
    if not 0 < info.documents <= info.tokens:
        return f"it says {info.documents} documents of {info.tokens} tokens"
    if info.vocab < 1 or info.dtype != dtype_of(info.vocab):
        return f"{info.dtype!r:.40} is not the dtype of a vocabulary of {info.vocab}"
    if info.eos is not None and not is_id(info.eos, info.vocab):
        return f"eos {info.eos!r:.40} is not an id below {info.vocab}"
    if not isinstance(info.tokenizer, str) or not isinstance(info.digest, str):
        return "the tokenizer's name and digest must be text"
    for what in ("sources", "languages"):
        parts = getattr(info, what)
        if not all(isinstance(x.name, str) and is_id(x.documents, MAX_COUNT)
                   and is_id(x.tokens, MAX_COUNT) and is_id(x.bytes, MAX_COUNT) for x in parts):
            return f"{what} must be a list of names with documents, tokens and bytes"
        if len({x.name for x in parts}) != len(parts) or len(parts) > MAX_NAMES:
            return f"{what} name one twice, or more than {MAX_NAMES}"
        for name in ("documents", "tokens"):
            if (total := sum(getattr(x, name) for x in parts)) != getattr(info, name):
                return f"the {name} of its {what} are {total}, not {getattr(info, name)}"
    return None
