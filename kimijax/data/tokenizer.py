"""Text <-> token ids of a model directory: tokenizer.json, Kimi's tiktoken.model, or bytes."""

import hashlib
import operator
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kimijax.data.codecs import BytesCodec, Codec, JsonCodec, TiktokenCodec, reserved_names
from kimijax.data.foreign import CONFIG, is_id, read_file, read_object, refusing
from kimijax.errors import UserError

HUGGING_FACE, TIKTOKEN = "tokenizer.json", "tiktoken.model"
GENERATION, TEMPLATE = "generation_config.json", "chat_template.jinja"
TURN_END = "<|im_end|>"
LOST = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Tokenizer:
    """Text <-> ids of one model directory.

    eos            ids that end a text or a turn, the tokenizer's own first; may be empty
    bos            the id a text begins with, None: nothing says so; `encode` never adds it
    chat_template  Jinja source that came with the files, None: there is none
    """

    codec: Codec
    eos: tuple[int, ...] = ()
    bos: int | None = None
    chat_template: str | None = None

    @property
    def vocab(self) -> int:
        """Every id is below it; a model needs at least as many rows."""
        return self.codec.vocab

    @property
    def specials(self) -> dict[str, int]:
        """Name -> id of the tokens that mean structure."""
        return self.codec.specials

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of a text; with `special`, names of special tokens in it become those tokens.

        UserError for text that is not Unicode or that the tokenizer cannot express.
        """
        _check_unicode(text)
        return self.codec.encode(text, special)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, as an array of whole numbers; the fastest way for many."""
        for text in texts:
            _check_unicode(text)
        return self.codec.encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, names of special tokens included; U+FFFD where bytes are not UTF-8."""
        ids = [operator.index(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab:
                raise UserError(
                    f"token {i} is outside the tokenizer's vocabulary of {self.vocab}: the ids "
                    "come from another tokenizer"
                )
        return self.codec.decode(ids)


class StreamDecoder:
    """Text of ids that come one by one: `push` returns what has become certain, `finish` the rest.

    Joined, the pieces are the tokenizer's `decode` of all ids. Half a character is held back.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._decode = tokenizer.decode
        self._ids: list[int] = []  # those shown last, then those held back
        self._context = 0  # ids shown: some decoders treat the first of a text differently
        self._shown = 0  # characters of their text

    def push(self, token: int) -> str:
        """The text that this id completes, often "" within a character of many bytes."""
        text = self._decode([*self._ids, token])
        self._ids.append(token)
        end = len(self._ids)
        if text.endswith(LOST):
            # A character has at most four bytes, so three more tokens settle what was before them.
            end = max(end - 3, 0)
            settled = self._decode(self._ids[:end])
            if not text.startswith(settled):
                return ""
            text = settled
        new = text[self._shown :]
        if new:
            del self._ids[: self._context]
            self._context = end - self._context
            self._shown = len(self._decode(self._ids[: self._context]))
        return new

    def finish(self) -> str:
        """The text still held back, with U+FFFD for half a character; then it starts anew."""
        text = self._decode(self._ids)[self._shown :]
        self._ids, self._context, self._shown = [], 0, 0
        return text


def load_tokenizer(directory: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a model directory; bytes (ids 0 to 255) where it has no tokenizer file.

    Read are tiktoken.model or else tokenizer.json (beside a tiktoken.model it is a conversion), and
    beside them tokenizer_config.json (names, bos, eos, template), generation_config.json (eos) and
    chat_template.jinja. UserError names file and fault, or the extra to install.
    """
    directory = Path(directory)
    if not directory.is_dir():
        state = "is not a directory" if directory.exists() else "does not exist"
        raise UserError(f"{directory}: {state}; name the directory of a model")
    config = read_object(directory / CONFIG)
    # lexists: a broken link is a fault to name, not a reason to read bytes.
    if os.path.lexists(path := directory / TIKTOKEN):
        codec: Codec = TiktokenCodec(path, reserved_names(directory / CONFIG, config))
    elif os.path.lexists(path := directory / HUGGING_FACE):
        codec = JsonCodec(path)
    else:
        codec = BytesCodec()
    ends = [_special_id(directory / CONFIG, config, "eos_token", codec)]
    ends += _generation_ends(directory / GENERATION, codec.vocab)
    ends += [codec.specials.get(TURN_END)]
    return Tokenizer(
        codec,
        eos=tuple(dict.fromkeys(i for i in ends if i is not None)),
        bos=_special_id(directory / CONFIG, config, "bos_token", codec),
        chat_template=_chat_template(directory, config),
    )


def tokenizer_digest(directory: str | os.PathLike | None) -> str:
    """A digest of what decides the ids of a text and its eos; None: of bytes."""
    names = (TIKTOKEN, HUGGING_FACE, CONFIG, GENERATION)
    paths = [] if directory is None else [Path(directory) / name for name in names]
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        if path.exists():
            content = read_file(path)
            digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text holds a lone surrogate, {text[error.start]!r}, at character "
            f"{error.start}: decode its source with errors='replace'"
        ) from error


def _special_id(path: Path, config: dict, key: str, codec: Codec) -> int | None:
    """The id of config's bos_token or eos_token: a name, an object with "content", or nothing."""
    name = config.get(key)
    name = name.get("content") if isinstance(name, dict) else name
    if name is None or isinstance(codec, BytesCodec):
        return None
    if not isinstance(name, str) or name not in codec.specials:
        raise UserError(f"{path}: {key} {name!r:.60} is not among the tokenizer's special tokens")
    return codec.specials[name]


def _generation_ends(path: Path, vocab: int) -> list[int]:
    """The ids of eos_token_id in generation_config.json: a number, a list of them, or nothing."""
    ends = read_object(path).get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    for i in ends:
        if not is_id(i, vocab):
            raise UserError(f"{path}: eos_token_id {i!r:.60} is not an id below {vocab}")
    return ends


def _chat_template(directory: Path, config: dict) -> str | None:
    path = directory / TEMPLATE
    if os.path.lexists(path):
        content = read_file(path, limit=1 << 20)
        with refusing(f"{path}: is not UTF-8", "fetch it again"):
            return content.decode("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        objects = [e for e in template if isinstance(e, dict)]  # a name may be no hashable value
        named = [e.get("template") for e in objects if e.get("name") == "default"]
        template = named[-1] if named else template
    if template is not None and not isinstance(template, str):
        raise UserError(
            f"{directory / CONFIG}: chat_template must be text, or a list with one named default, "
            f"not {template!r:.60}"
        )
    return template
