"""Text -> ids -> text for every kind of tokenizer; hostile files and hostile text are refused."""

import base64
import json
import sys

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from kimijax.data.codecs import KIMI_PATTERN, RESERVED, _bounded
from kimijax.data.tokenizer import StreamDecoder, load_tokenizer
from kimijax.errors import UserError

TEXTS = [
    "",
    "Hello world, it's 12345 o'clock.\r\n\n  Two  spaces\tand a tab ",
    "长上下文模型 reads 二百万 tokens",
    "naïve café Straße ελληνικά עברית ไทย",
    "\U0001f469\u200d\U0001f4bb\U0001f600 emoji and \N{REPLACEMENT CHARACTER} itself",
    "<|im_end|>[BOS]<|reserved_token_300|><tool>",
]
MERGES = [b"th", b"he", b"the", b" t", b"in", b"12", b"123", "长".encode(), "上下".encode()]
NAMES = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>"}


def kimi_ranks():
    pieces = [bytes([i]) for i in range(256)] + MERGES[:7]
    pieces += ["长".encode()[:2], "长".encode(), "上".encode()[:2], "上".encode()]
    return pieces


def write_kimi(directory, pieces=None, names=NAMES, **config):
    pieces = kimi_ranks() if pieces is None else pieces
    lines = [base64.b64encode(piece) + b" %d" % i for i, piece in enumerate(pieces)]
    (directory / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
    decoder = {str(len(pieces) + i): {"content": name, "special": False}
               for i, name in names.items()}
    config = {"added_tokens_decoder": decoder, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def library_bpe():
    tokenizer = Library(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, show_progress=False, special_tokens=["[BOS]", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens(["<tool>", "   "])  # flagged not special
    return tokenizer


def write_library(directory, **changes):
    data = {**json.loads(library_bpe().to_str()), **changes}
    (directory / "tokenizer.json").write_text(json.dumps(data))
    return directory


WRITERS = {"bytes": lambda directory: directory, "kimi": write_kimi, "library": write_library}


@pytest.fixture(scope="module", params=list(WRITERS))
def tokenizer(request, tmp_path_factory):
    return load_tokenizer(WRITERS[request.param](tmp_path_factory.mktemp(request.param)))


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_and_streams_as_one(tokenizer, text):
    for special in (False, True):
        ids = tokenizer.encode(text, special=special)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab for i in ids)
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_broken_utf8_streams_as_decoded(tokenizer, rng):
    """Random ids are mostly broken characters; the text of them does not depend on streaming."""
    for _ in range(40):
        ids = rng.integers(0, min(tokenizer.vocab, 330), size=40).tolist()
        stream = StreamDecoder(tokenizer)
        assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)
        assert stream.finish() == ""


def test_text_becomes_a_special_token_only_when_asked(tokenizer):
    special = set(tokenizer.specials.values())
    for text in TEXTS:
        assert special.isdisjoint(tokenizer.encode(text))
    batch = tokenizer.encode_batch(TEXTS)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in TEXTS]
    for name, i in tokenizer.specials.items():
        assert tokenizer.encode(f"a{name}b", special=True)[1:-1] == [i]
        assert i not in tokenizer.encode(f"a{name}b")


def test_kimi_reads_its_names_and_ends(tmp_path):
    write_kimi(tmp_path, eos_token="[EOS]", bos_token={"content": "[BOS]"}, chat_template="c")
    base = len(kimi_ranks())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [base + 2]}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab == base + RESERVED
    assert len(tokenizer.specials) == RESERVED
    assert tokenizer.bos == tokenizer.specials["[BOS]"] == base
    assert tokenizer.eos == (base + 1, base + 2)
    assert tokenizer.specials[f"<|reserved_token_{base + 4}|>"] == base + 4
    assert tokenizer.chat_template == "c"
    (tmp_path / "chat_template.jinja").write_text("of its own")
    assert load_tokenizer(tmp_path).chat_template == "of its own"


def test_kimi_without_names_has_reserved_ones(tmp_path):
    tokenizer = load_tokenizer(write_kimi(tmp_path, names={}))
    assert all(name == f"<|reserved_token_{i}|>" for name, i in tokenizer.specials.items())
    assert tokenizer.eos == () and tokenizer.bos is None and tokenizer.chat_template is None


def test_kimi_cuts_text_as_written_down():
    """Pieces that no merge may cross, told from tokens that are whole pieces."""
    import tiktoken

    text = "It's长文 DON'T 12345 a1  b\n\n !?x"
    want = ["It's", "长文", " DON'T", " ", "123", "45", " a", "1", " ", " b", "\n\n", " !?", "x"]
    ranks = {bytes([i]): i for i in range(256)}
    for piece in want:  # every beginning of a piece is a token, so that merges reach the piece
        data = piece.encode()
        for end in range(2, len(data) + 1):
            ranks.setdefault(data[:end], len(ranks))
    ranks.setdefault("文 DON".encode(), len(ranks))
    encoding = tiktoken.Encoding("test", pat_str=KIMI_PATTERN, mergeable_ranks=ranks,
                                 special_tokens={})
    assert [encoding.decode([i]) for i in encoding.encode_ordinary(text)] == want


def test_long_text_is_cut_where_the_reference_cuts():
    """Within 400,000 characters, after 25,000 of one run: "c...cd" is a run of 25,001."""
    text = "a" * 60_000 + " b" + " " * 25_000 + "c" * 25_000 + "d " * 200_000
    pieces = list(_bounded(text))
    assert "".join(pieces) == text
    assert [len(piece) for piece in pieces] == [25_000, 25_000, 60_002, 289_998, 110_002]


def test_a_name_in_the_ordinary_vocabulary_is_broken_up(tmp_path):
    library = Library(models.WordLevel({"a": 0, "[X]": 1, "?": 2}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["[X]", "?"])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a [X] b", special=True) == [0, 1, 2]
    assert tokenizer.encode("a [X] b") == [0, 2, 2, 2]
    assert [x.tolist() for x in tokenizer.encode_batch(["a", "a [X] b"])] == [[0], [0, 2, 2, 2]]


def test_a_file_cannot_cut_or_fill_what_is_encoded(tmp_path):
    write_library(
        tmp_path,
        truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        padding={"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None,
                 "pad_id": 0, "pad_type_id": 0, "pad_token": "[BOS]"},
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(TEXTS[1])) == TEXTS[1]


def test_ids_and_text_that_do_not_fit_are_refused(tokenizer):
    for i in (-1, tokenizer.vocab, 2**40):
        with pytest.raises(UserError, match=f"token {i} is outside the tokenizer's vocabulary"):
            tokenizer.decode([i])
    with pytest.raises(UserError, match="lone surrogate"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize(
    "content, fault",
    [
        (b"AA== zero", "line 1 is"),
        (b"!!!! 0", "line 1 is"),
        (b"AA== 0\nAA== 1", "line 2 is"),
        (b"AA== -1", "line 1 is"),
        (b"AA== " + b"9" * 5000, "line 1 is"),
        (b"\xff\xfe", "line 1 is"),
        (b"AA== 1", "0 is not among them"),
        (b"AA== 0", "no token for the byte 1"),
        (b"", "no token for the byte 0"),
    ],
)
def test_a_hostile_rank_file_is_refused(tmp_path, content, fault):
    (tmp_path / "tiktoken.model").write_bytes(content)
    with pytest.raises(UserError, match=fault) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value) and "tiktoken.model" in str(error.value)


@pytest.mark.parametrize(
    "config, fault",
    [
        ("[]", "must be a JSON object"),
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ({"added_tokens_decoder": {"5": {"content": "x"}}}, "names token 5"),
        ({"added_tokens_decoder": {"99999": {"content": "x"}}}, "names token 99999"),
        ({"added_tokens_decoder": {"-1": {"content": "x"}}}, "holds '-1'"),
        ({"added_tokens_decoder": {"300": {"content": ""}}}, "holds '300'"),
        ({"added_tokens_decoder": []}, "must be an object"),
        ({"added_tokens_decoder": {"300": {"content": "x"}, "301": {"content": "x"}}}, "two"),
        ({"eos_token": "</s>"}, "eos_token '</s>' is not among"),
        ({"chat_template": 3}, "chat_template must be text"),
        ({"chat_template": [{"name": ["l"]}]}, "chat_template must be text"),
    ],
)
def test_a_hostile_config_is_refused(tmp_path, config, fault):
    write_kimi(tmp_path)
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(UserError, match=fault) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({"model": {"type": "Nonsense"}}, "is no tokenizer"),
        ({"added_tokens": {}, "model": None}, "is no tokenizer"),
        ({"added_tokens": 3}, "must be a list"),
        ({"added_tokens": [3]}, "added_tokens holds 3"),
        ({"added_tokens": [{"content": "x", "id": 2**40}]}, "added_tokens holds"),
        ({"added_tokens": [{"content": "x", "id": 9999, "single_word": False, "lstrip": False,
                            "rstrip": False, "normalized": False, "special": True}]},
         "says that 'x' is token 9999"),
    ],
)
def test_a_hostile_tokenizer_json_is_refused(tmp_path, changes, fault):
    with pytest.raises(UserError, match=fault) as error:
        load_tokenizer(write_library(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path)
    write_kimi(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [true]}')
    with pytest.raises(UserError, match="eos_token_id True is not an id below"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind, module", [("kimi", "tiktoken"), ("library", "tokenizers")])
def test_a_missing_library_names_the_extra(tmp_path, monkeypatch, kind, module):
    WRITERS[kind](tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install kimijax\[text\]"):
        load_tokenizer(tmp_path)
