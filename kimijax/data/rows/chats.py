"""Conversations to learn from: what the assistant says, and nothing else, to the token."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kimijax.data.chat import encode_chat
from kimijax.data.dataset.part import BadLines
from kimijax.data.documents.read import json_lines, json_object
from kimijax.data.tokenizer import Tokenizer
from kimijax.errors import UserError


@dataclass(frozen=True, eq=False)
class Chats:
    """Conversations one after the other, to be packed (`kimijax.data.rows.packed`)."""

    ids: np.ndarray  # int32 [tokens]
    learned: np.ndarray  # float32 [tokens], 1: the assistant's
    ends: np.ndarray  # int64 [conversations]
    vocab: int
    bad: int  # lines that were left out

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each conversation, int64."""
        return np.diff(self.ends, prepend=0)

    def read(self, spans: Sequence[tuple[int, int, int]]) -> list[np.ndarray]:
        """The ids of (conversation, offset, length) each, int32."""
        return [self.ids[part] for part in self._slices(spans)]

    def masks(self, spans: Sequence[tuple[int, int, int]]) -> list[np.ndarray]:
        """Weights of learning each of their tokens."""
        return [self.learned[part] for part in self._slices(spans)]

    def _slices(self, spans):
        starts = self.ends - self.lengths
        return [slice(starts[i] + at, starts[i] + at + n) for i, at, n in spans]


def read_chats(
    path: str | os.PathLike, tokenizer: Tokenizer, bad_lines: BadLines = "fail"
) -> Chats:
    """The conversations of a JSONL file (or .jsonl.gz) of {"messages": [...], "tools": [...]}.

    They are rendered by the tokenizer's chat template, or in Kimi K2's own format. All are held in
    memory. UserError: a line is faulty, unless such are skipped; or no conversation is there.
    """
    ids, masks, bad = [], [], 0
    for number, line in json_lines(Path(path)):
        try:
            chat = json_object(line)
            if isinstance(chat, str):
                raise UserError(chat)
            if "messages" not in chat:
                raise UserError("lacks the field 'messages'")
            one, mask = encode_learned(tokenizer, chat["messages"], chat.get("tools"))
        except UserError as error:
            if bad_lines == "skip":
                bad += 1
                continue
            raise UserError(f"{path}: line {number} {error}; mend it, or leave such lines "
                            "out by skipping bad lines") from error
        ids.append(one)
        masks.append(mask)
    if not ids:
        raise UserError(f"{path}: no conversation in it, {bad} faulty lines; give lines of "
                        '{"messages": [{"role": ..., "content": ...}, ...]}')
    ends = np.cumsum([len(x) for x in ids])
    return Chats(np.concatenate(ids), np.concatenate(masks), ends, tokenizer.vocab, bad)


def encode_learned(
    tokenizer: Tokenizer, messages: Sequence[Mapping], tools: Sequence[Mapping] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a conversation, int32, and which of them are learned, float32.

    Learned is what stands behind the prompt that asks the assistant for its turn, as far as the
    end token of the turn. UserError: nothing is, or the template writes a turn otherwise once
    others follow, as those do that take thoughts out of the past.
    """

    def encoded(count: int, prompt: bool) -> list[int]:
        return encode_chat(tokenizer, messages[:count], tools, tokenizer.chat_template, prompt)

    if not isinstance(messages, list):
        raise UserError(f"has {messages!r:.60} as 'messages', which must be a list")
    ids = encoded(len(messages), False)
    mask = np.zeros(len(ids), np.float32)
    turns = [i for i, x in enumerate(messages) if x["role"] == "assistant"]
    if not turns:
        raise UserError("has no message of the assistant to learn from")
    if turns[0] == 0:
        raise UserError("begins with a message of the assistant, which nothing asked for")
    for i in turns:
        before, after = encoded(i, True), encoded(i + 1, False)
        if after[: len(before)] != before or ids[: len(after)] != after:
            raise UserError(
                f"has at message {i} a turn that the chat template writes in another way where it "
                "asks for it or where others follow: what to learn of it cannot be told"
            )
        end = len(after)
        closing = [j for j in range(len(before), end) if after[j] in tokenizer.eos]
        mask[len(before) : closing[-1] + 1 if closing else end] = 1
    return np.array(ids, np.int32), mask
