"""What is learned of a conversation is what the assistant says, to the token."""

import json

import numpy as np
import pytest

from kimijax.data.chat import encode_chat
from kimijax.data.rows.chats import encode_learned, read_chats
from kimijax.data.rows.packed import packed_rows
from kimijax.data.tokenizer import load_tokenizer
from kimijax.errors import UserError
from tests.data.files import write
from tests.test_tokenizer import write_kimi

TALK = [
    {"role": "user", "content": "the quick brown fox?"},
    {"role": "assistant", "content": "jumps over"},
    {"role": "user", "content": "and 12345"},
    {"role": "assistant", "content": "the lazy dog\n长上下文"},
]


@pytest.fixture(scope="module", params=["template", "kimi"])
def tokenizer(request, model_dir, tmp_path_factory):
    if request.param == "template":
        return load_tokenizer(model_dir)
    names = ("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>",
             "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
             "<|tool_call_argument_begin|>", "<|tool_call_end|>")
    directory = tmp_path_factory.mktemp("kimi")
    return load_tokenizer(write_kimi(directory, names=dict(enumerate(names))))


def test_only_the_assistants_tokens_are_learned(tokenizer):
    ids, mask = encode_learned(tokenizer, TALK)
    assert ids.tolist() == encode_chat(tokenizer, TALK, None, tokenizer.chat_template, False)
    end = "<eos>" if tokenizer.chat_template else "<|im_end|>"
    edges = np.flatnonzero(np.diff(mask, prepend=0, append=0))
    spans = [tokenizer.decode(ids[a:b]) for a, b in edges.reshape(-1, 2)]
    assert spans == [f"{x['content']}{end}" for x in TALK[1::2]]


@pytest.mark.parametrize("tokenizer", ["kimi"], indirect=True)
def test_tool_calls_are_learned_and_their_results_are_not(tokenizer):
    call = {"id": "f:0", "function": {"name": "f", "arguments": "{}"}}
    talk = [TALK[0], {"role": "assistant", "content": "so: ", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "f:0", "content": "42"}, TALK[1]]
    ids, mask = encode_learned(tokenizer, talk)
    learned = tokenizer.decode(ids[mask > 0])
    assert "<|tool_call_begin|>f:0" in learned and "42" not in learned
    assert learned.endswith("jumps over<|im_end|>")


def test_a_file_of_conversations_becomes_rows(tokenizer, tmp_path):
    talks = [TALK, TALK[:2], TALK[2:]]
    path = write(tmp_path / "talks.jsonl.gz", [{"messages": x} for x in talks])
    chats = read_chats(path, tokenizer)
    want = [encode_learned(tokenizer, x) for x in talks]
    rows = packed_rows(chats, 4096, 0)
    assert len(rows) == 1
    row = rows[0]
    got = sorted((row.ids[row.seg == i].tolist(), row.weight[row.seg == i][:-1].tolist())
                 for i in range(3))
    assert got == sorted((ids.tolist(), mask[1:].tolist()) for ids, mask in want)
    longest = int(chats.lengths.max())
    for long, count in (("cut", 3), ("drop", 2)):
        rows = packed_rows(chats, longest - 1, 0, long=long)
        assert sum(rows[i].seg.max() + 1 for i in range(len(rows))) == count


@pytest.mark.parametrize(
    "line, fault",
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is not an object"),
        ("{}", "line 2 lacks the field 'messages'"),
        ('{"messages": 3}', "line 2 has 3 as 'messages'"),
        ('{"messages": []}', "line 2 a chat needs at least one message"),
        ('{"messages": [{"role": "king", "content": "x"}]}', "line 2 message 0 has the role"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "has no message of the assistant"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "begins with a message of the"),
    ],
)
def test_faulty_lines_are_refused_or_left_out(tokenizer, tmp_path, line, fault):
    good = json.dumps({"messages": TALK})
    path = write(tmp_path / "talks.jsonl", f"{good}\n{line}\n{good}\n")
    with pytest.raises(UserError, match=fault.replace("[", r"\[")):
        read_chats(path, tokenizer)
    chats = read_chats(path, tokenizer, "skip")
    assert (len(chats.lengths), chats.bad) == (2, 1)
    path.write_text(line)
    with pytest.raises(UserError, match="no conversation in it, 1 faulty lines"):
        read_chats(path, tokenizer, "skip")


def test_a_template_that_rewrites_the_past_is_refused(model_dir, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model_dir / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}<|bot|>{% if loop.last %}{{ m.content }}{% endif %}<eos>"
        "{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
    )
    with pytest.raises(UserError, match="has at message 1 a turn that the chat template writes"):
        encode_learned(load_tokenizer(tmp_path), TALK)
