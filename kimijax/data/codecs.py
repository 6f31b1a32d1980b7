"""Token ids as three kinds of files define them; the files are read as if a stranger had made them.

Of all text, only what is asked for encodes to a special token.
"""

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from kimijax.data.foreign import CONFIG, is_id, need, read_file, read_object, refusing
from kimijax.errors import UserError

RESERVED = 256  # special ids behind a tiktoken.model's own; with K2's 163,584 they make 163,840

MAX_VOCAB = 1 << 24

# How Kimi cuts text before merging bytes (tokenization_kimi.py beside the weights of Kimi-K2).
# Words keep one leading mark and an English ending; Han stands alone, numbers are cut in threes.
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
KIMI_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
# The same file cuts long text here, since tiktoken's regex overflows on it; the cuts decide ids.
_MAX_TEXT, _MAX_RUN = 400_000, 25_000
_LONG_RUN = re.compile(rf"\s{{{_MAX_RUN + 1},}}|\S{{{_MAX_RUN + 1},}}")


class Codec(Protocol):
    """What differs between the kinds. Ids and text were checked by `Tokenizer`."""

    vocab: int
    specials: dict[str, int]

    def encode(self, text: str, special: bool) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode(self, ids: list[int]) -> str: ...


class BytesCodec:
    vocab = 256

    def __init__(self) -> None:
        self.specials: dict[str, int] = {}

    def encode(self, text: str, special: bool) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


class TiktokenCodec:
    """Byte pairs merged by rank, and 256 reserved ids behind them."""

    def __init__(self, path: Path, names: Mapping[int, str]):
        tiktoken = need("tiktoken", path.name)
        ranks = _read_ranks(path)
        base = len(ranks)
        for i in names:
            if not base <= i < base + RESERVED:
                raise UserError(
                    f"{path.with_name(CONFIG)}: added_tokens_decoder names token {i}, but "
                    f"{path.name} reserves {base} to {base + RESERVED - 1}: take both files from "
                    "one model"
                )
        reserved = range(base, base + RESERVED)
        self.specials = {names.get(i, f"<|reserved_token_{i}|>"): i for i in reserved}
        if len(self.specials) < RESERVED:
            raise UserError(
                f"{path.with_name(CONFIG)}: added_tokens_decoder gives one name to two tokens"
            )
        self.vocab = base + RESERVED
        with refusing(str(path), "fetch it again"):
            self._encoding = tiktoken.Encoding(
                name=path.name,
                pat_str=KIMI_PATTERN,
                mergeable_ranks=ranks,
                special_tokens=self.specials,
            )

    def encode(self, text: str, special: bool) -> list[int]:
        ids: list[int] = []
        with refusing("the text cannot be encoded", "encode it in smaller pieces"):
            for piece in _bounded(text):
                if special:
                    ids += self._encoding.encode(piece, allowed_special="all")
                else:
                    ids += self._encoding.encode_ordinary(piece)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(self.encode(text, special=False), np.uint32) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids)


class JsonCodec:
    """A tokenizer.json. Every added token but runs of spaces is special, whatever its flag says.

    Files often flag tool marks as not special to keep them in decoded text; a user's text must not
    become one all the same.
    """

    def __init__(self, path: Path):
        library = need("tokenizers", path.name)
        data = read_object(path)
        if not data:
            raise UserError(f"{path}: is empty or cannot be found; fetch it again")
        added = _added_tokens(path, data)
        self.specials = {name: i for name, i in added.items() if name.strip()}
        with refusing(f"{path}: is no tokenizer", "fetch it again"):
            source = json.dumps(data)
            self._marked, self._plain = (library.Tokenizer.from_str(source) for _ in range(2))
            ids = self._marked.get_vocab(with_added_tokens=True)
        self._plain.encode_special_tokens = True  # the library's name for "as ordinary text"
        for tokenizer in (self._marked, self._plain):
            tokenizer.no_truncation()  # a file may say to cut or to fill what it encodes
            tokenizer.no_padding()
        self.vocab = max(ids.values(), default=-1) + 1
        if not 0 < self.vocab <= MAX_VOCAB:
            raise UserError(
                f"{path}: its ids end at {self.vocab - 1}; must be from 0 to {MAX_VOCAB - 1}"
            )
        for name, i in added.items():
            if ids.get(name) != i:
                raise UserError(f"{path}: says that {name!r} is token {i}, but it is {ids[name]}")
        unknown = _unknown_id(data, ids)
        self._forbidden = set(self.specials.values()) - {unknown}
        names = sorted(self.specials, key=len, reverse=True)
        self._mark = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def encode(self, text: str, special: bool) -> list[int]:
        with refusing("the text cannot be encoded", "the tokenizer lacks a token for it"):
            if special:
                return self._marked.encode(text, add_special_tokens=False).ids
            ids = self._plain.encode(text, add_special_tokens=False).ids
            if self._forbidden.isdisjoint(ids):
                return ids
            # Its ordinary vocabulary holds the names too: break them after the first letter.
            cuts = [0, *(m.start() + 1 for m in self._mark.finditer(text)), len(text)]
            pieces = [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
            ids = [i for p in pieces for i in self._plain.encode(p, add_special_tokens=False).ids]
        if not self._forbidden.isdisjoint(ids):
            raise UserError(
                "the text holds the name of a special token, which this tokenizer cannot write as "
                "ordinary text: remove it"
            )
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        with refusing("a text cannot be encoded", "the tokenizer lacks a token for it"):
            batch = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
            found = [np.array(encoding.ids, np.uint32) for encoding in batch]
        forbidden = np.fromiter(self._forbidden, np.uint32)
        return [
            np.array(self.encode(text, special=False), np.uint32)
            if np.isin(ids, forbidden).any() else ids
            for text, ids in zip(texts, found, strict=True)
        ]

    def decode(self, ids: list[int]) -> str:
        with refusing("the tokens cannot be decoded", "fetch the tokenizer again"):
            return self._marked.decode(ids, skip_special_tokens=False)


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Token -> rank from lines "base64 rank"; ranks are 0, 1, ... and every byte is a token."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_file(path).splitlines(), 1):
        if not line:
            continue
        token, _, rank = line.partition(b" ")
        try:
            piece = base64.b64decode(token, validate=True)
            if not piece or not rank.isdigit() or len(rank) > 8 or piece in ranks:
                raise ValueError
        except ValueError:
            raise UserError(
                f"{path}: line {number} is {line[:60]!r}, not a new token in base64 and its rank; "
                "fetch it again"
            ) from None
        ranks[piece] = int(rank)
    missing = set(range(len(ranks))).difference(ranks.values())
    if missing or len(ranks) > MAX_VOCAB:
        raise UserError(
            f"{path}: {len(ranks)} ranks must be 0 to {len(ranks) - 1}, each once, but "
            f"{min(missing, default=MAX_VOCAB)} is not among them; fetch it again"
        )
    if absent := [i for i in range(256) if bytes([i]) not in ranks]:
        raise UserError(f"{path}: has no token for the byte {absent[0]}; fetch it again")
    return ranks


def _bounded(text: str) -> Iterator[str]:
    """The text in the pieces that the reference encodes one by one."""
    for begin in range(0, len(text), _MAX_TEXT):
        part, start = text[begin : begin + _MAX_TEXT], 0
        for run in _LONG_RUN.finditer(part):
            for cut in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN):
                yield part[start:cut]
                start = cut
        yield part[start:]


def reserved_names(path: Path, config: dict) -> dict[int, str]:
    """Id -> name from added_tokens_decoder of tokenizer_config.json."""
    entries = config.get("added_tokens_decoder", {})
    if not isinstance(entries, dict):
        raise UserError(f"{path}: added_tokens_decoder must be an object, not {entries!r:.60}")
    names = {}
    for key, entry in entries.items():
        name = entry.get("content") if isinstance(entry, dict) else None
        if not (key.isascii() and key.isdigit() and len(key) < 9 and _is_name(name)):
            raise UserError(
                f"{path}: added_tokens_decoder holds {key!r:.40}: {entry!r:.60}; must be an id and "
                'an object with "content"'
            )
        names[int(key)] = name
    return names


def _added_tokens(path: Path, data: dict) -> dict[str, int]:
    """Name -> id of the added tokens, which are flagged special unless they are only spaces."""
    entries = data.get("added_tokens") or []
    if not isinstance(entries, list):
        raise UserError(f"{path}: added_tokens must be a list, not {entries!r:.60}")
    added: dict[str, int] = {}
    for entry in entries:
        name = entry.get("content") if isinstance(entry, dict) else None
        i = entry.get("id") if isinstance(entry, dict) else None
        if not _is_name(name) or not is_id(i, MAX_VOCAB) or name in added:
            raise UserError(
                f"{path}: added_tokens holds {entry!r:.80}; must be an object with a new "
                f'"content" and an "id" below {MAX_VOCAB}'
            )
        entry["special"] = bool(name.strip())
        added[name] = i
    return added


def _unknown_id(data: dict, ids: dict[str, int]) -> int | None:
    """The id that the model gives to what it cannot express: text may always become it."""
    model = data["model"]  # the library has read it
    return model["unk_id"] if "unk_id" in model else ids.get(model.get("unk_token") or "")


def _is_name(name: object) -> bool:
    return isinstance(name, str) and bool(name)
