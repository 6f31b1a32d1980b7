"""The corpus splits without a leak; needles lie where they are said to lie."""

import os
from itertools import pairwise

import numpy as np
import pytest

from kimijax.data import corpus, haystack
from kimijax.data.haystack import NEEDLE, draw_digits, draw_words, find_needle, hide, read_haystack
from kimijax.errors import UserError


def write(root, relative, content):
    path = root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def text(tag, size=400):
    return f"# {tag}\n".encode().ljust(size, b"x")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def lines(rng):
    """20,000 bytes of lines of 0 to 59 letters."""
    letters = rng.choice(np.frombuffer(b"abcdefgh", np.uint8), size=20_000)
    ends = np.cumsum(rng.integers(1, 61, size=2000))
    letters[ends[ends < 20_000]] = ord("\n")
    return letters


def test_split_does_not_depend_on_where_or_which_version(tmp_path):
    trees = {
        "old/lib/python3.11/site-packages": ("absl_py-2.5.1.dist-info", "pip/_vendor/rich"),
        "new/lib/python3.13/site-packages": ("absl_py-2.6.0rc1.dist-info", "rich"),
    }
    sides = []
    for i, (root, (info, rich)) in enumerate(trees.items()):
        names = [f"{info}/entry.py", f"{rich}/table.py"] + [f"pkg/m{j}.py" for j in range(40)]
        for name in names:
            write(tmp_path, f"{root}/{name}", text(f"{name} {i}"))
        files = corpus.environment_files(roots=[tmp_path / root])
        assert len(files) == len(names)
        sides.append({file.key: corpus.split_of(file.key) for file in files})
    assert sides[0] == sides[1]
    assert set(sides[0].values()) == {"train", "held_out"}


def test_one_key_in_five_is_held_out():
    held = sum(corpus.split_of(f"pkg/module_{i}.py") == "held_out" for i in range(5000))
    assert 900 < held < 1100
    assert corpus.split_of("pkg/c.py") == "held_out"  # written down: it may never change
    assert corpus.split_of("pkg/a.py") == "train"


def test_files_left_out(tmp_path):
    stdlib = tmp_path / "python3.11"
    site = stdlib / "site-packages"
    keep = [write(stdlib, "os.py", text("os")), write(site, "jax/api.py", text("api"))]
    write(stdlib, "__pycache__/os.py", text("cache"))
    write(stdlib, "short.py", b"pass")
    write(stdlib, "long.py", text("long", corpus.MAX_BYTES + 1))
    write(stdlib, "notes.txt", text("notes"))
    write(stdlib, "dist-packages/other.py", text("another environment"))
    for name in ("kimijax/x.py", "experiments/x.py", "kimijax-0.1.dist-info/x.py"):
        write(site, name, text(name))
    write(site, "__editable___kimijax_finder.py", text("hook"))
    outside = write(tmp_path, "home/secret.py", text("secret"))
    (site / "link.py").symlink_to(outside)
    (site / "linked").symlink_to(outside.parent)
    got = corpus.environment_files(roots=[stdlib, site, site])
    assert {file.path for file in got} == set(keep)
    assert [file.key for file in got] == ["jax/api.py", "os.py"]


def test_no_content_on_both_sides(tmp_path):
    for i in range(60):
        write(tmp_path, f"a/m{i}.py", text(i % 20))  # most contents fall on both sides
        write(tmp_path, f"b/n{i}.py", text(f"only {i}"))
    train, held = (corpus.load_documents(side, roots=[tmp_path]) for side in ("train", "held_out"))
    assert not set(train) & set(held)
    assert len(train) == len(set(train)) and len(held) == len(set(held))
    assert set(train) | set(held) == {text(i) for i in range(20)} | {
        text(f"only {i}") for i in range(60)
    }
    files = corpus.environment_files(roots=[tmp_path])
    assert {f.path.read_bytes() for f in files if corpus.split_of(f.key) == "train"} == set(train)
    assert held == corpus.load_documents("held_out", roots=[tmp_path])
    with pytest.raises(ValueError, match="held_out"):
        corpus.load_documents("test", roots=[tmp_path])


def test_concatenate():
    documents = [b"one", b"two", b"three", b"four"]
    assert corpus.concatenate(documents).tobytes() == b"one\ntwo\nthree\nfour"
    got = corpus.concatenate(documents, seed=1)
    assert got.dtype == np.uint8 and got.flags.writeable
    assert sorted(got.tobytes().split(b"\n")) == sorted(documents)
    np.testing.assert_array_equal(got, corpus.concatenate(documents, seed=1))
    assert corpus.concatenate([]).shape == (0,)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 60])
def test_needles_lie_where_they_say(rng, lines, count):
    context = 12_345
    words, digits = draw_words(rng, count), draw_digits(rng, count)
    tokens, needles = hide(lines, context, words, digits)
    assert tokens.shape == (context,) and tokens.dtype == np.uint8
    assert [(n.word, n.digits) for n in needles] == list(zip(words, digits, strict=True))
    rest = np.ones(context, bool)
    for n in needles:
        want = NEEDLE.format(word=n.word, digits=n.digits).encode()
        assert tokens[n.position : n.position + len(want)].tobytes() == want
        assert tokens[n.digits_position : n.digits_position + 5].tobytes() == n.digits.encode()
        assert abs(n.position / (context - len(want)) - n.depth) < 0.03
        rest[n.position : n.position + len(want)] = False
    np.testing.assert_array_equal(tokens[rest], lines[: rest.sum()])
    assert rest.sum() == context - sum(len(NEEDLE.format(word=w, digits="0" * 5)) for w in words)


def test_needles_run_from_end_to_end_and_start_lines(rng, lines):
    words = draw_words(rng, 11)
    tokens, needles = hide(lines, 12_000, words, draw_digits(rng, 11))
    np.testing.assert_allclose([n.depth for n in needles], np.arange(11) / 10)
    assert needles[0].position == 0 and tokens[-2:].tobytes() == b". "
    assert all(tokens[n.position - 1] == ord("\n") for n in needles[1:-1])
    assert all(a.digits_position < b.position for a, b in pairwise(needles))
    _, (middle,) = hide(lines, 12_000, ["alpha"], ["01234"])
    assert middle.depth == 0.5


def test_needles_stay_in_place_without_lines():
    _, needles = hide(np.full(5000, ord("x"), np.uint8), 3100, ["iris", "axis", "basis"], ["1"] * 3)
    size = len(NEEDLE.format(word="iris", digits="1"))
    assert [n.position for n in needles] == [0, size + (3100 - 3 * size - 1) // 2, 3100 - size - 1]


def test_needles_may_fill_the_context(rng, lines):
    size = len(NEEDLE.format(word="alpha", digits="01234"))
    tokens, _ = hide(lines, size, ["alpha"], ["01234"])
    assert tokens.tobytes() == b" The pass key for alpha is 01234. "
    with pytest.raises(UserError, match=f"needles take {size} bytes.*context is {size - 1}"):
        hide(lines, size - 1, ["alpha"], ["01234"])
    want = rf"20,000 bytes.*context of {20_001 + size:,} needs.*at most {20_000 + size:,}$"
    with pytest.raises(UserError, match=want):
        hide(lines, 20_001 + size, ["alpha"], ["01234"])


def test_words_and_digits(rng):
    words = draw_words(rng, 500)
    assert len(set(words)) == 500
    assert all(4 <= len(w) <= 8 and w.isascii() and w.islower() and w.isalpha() for w in words)
    digits = draw_digits(rng, 500)
    assert len(set(digits)) == 500 and all(len(d) == 5 and d.isdigit() for d in digits)
    assert draw_words(np.random.default_rng(3), 9) == draw_words(np.random.default_rng(3), 9)
    with pytest.raises(UserError, match="100,001 needles"):
        draw_digits(rng, 100_001)


@pytest.mark.parametrize("count", [0, 1, 100, 101])
def test_twins_differ_in_one_letter(rng, count):
    words = draw_words(rng, count, twins=True)
    assert len(set(words)) == len(words) == count
    for a, b in zip(words[0::2], words[1::2], strict=False):
        assert sum(x != y for x, y in zip(a, b, strict=True)) == 1


def test_read_directory(tmp_path):
    write(tmp_path, "in/b.txt", b"bee")
    write(tmp_path, "in/a/z.txt", b"zed")
    write(tmp_path, "in/.git/config", b"hidden")
    write(tmp_path, "in/binary", b"ab\0cd")
    write(tmp_path, "in/empty", b"")
    (tmp_path / "in/link").symlink_to(write(tmp_path, "outside.txt", b"outside"))
    assert read_haystack(str(tmp_path / "in")).tobytes() == b"zed\nbee"
    assert read_haystack(str(tmp_path / "in"), limit=5).tobytes() == b"zed\nb"
    assert read_haystack(str(tmp_path / "in/b.txt")).tobytes() == b"bee"
    assert read_haystack(str(tmp_path / "in/b.txt"), limit=2).tobytes() == b"be"


def test_read_environment(tmp_path, monkeypatch):
    for i in range(40):
        write(tmp_path, f"m{i}.py", text(i))
    monkeypatch.setattr(corpus, "environment_roots", lambda: [tmp_path])
    got = read_haystack(None, seed=1).tobytes().split(b"\n# ")
    assert len(got) == len(corpus.load_documents("held_out", roots=[tmp_path])) > 1
    assert read_haystack(None, seed=1, limit=10).shape == (10,)


def test_bad_haystacks(tmp_path, monkeypatch):
    file = write(tmp_path, "in/file", b"text")
    write(tmp_path, "blank/empty", b"")
    write(tmp_path, "bin", b"\0")
    os.mkfifo(tmp_path / "pipe")
    for name in ("blank", "blank/empty", "bin", "pipe"):
        with pytest.raises(UserError, match=f"{tmp_path / name}: no text in it"):
            read_haystack(str(tmp_path / name))
    with pytest.raises(UserError, match=f"{tmp_path}/none does not exist"):
        read_haystack(str(tmp_path / "none"))
    with pytest.raises(UserError, match="path is empty"):
        read_haystack("")

    def refuse(self, *args):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(haystack.Path, "open", refuse)
    with pytest.raises(UserError, match=rf"cannot read {file} \(Permission denied\)"):
        read_haystack(str(tmp_path / "in"))


def test_find_what_was_hidden(rng, lines):
    words = draw_words(rng, 9, twins=True)
    tokens, needles = hide(lines, 9000, words, draw_digits(rng, 9))
    for want in needles:
        got = find_needle(tokens, want.word)
        assert (got.position, got.digits_position) == (want.position, want.digits_position)
        assert got.digits == want.digits and abs(got.depth - want.depth) < 0.05


def test_find_in_a_users_text():
    tokens = np.frombuffer(
        b"Notes.\nThe pass key for alpha is 12345.\nThe pass key for beta is 1.\n"
        b"The pass key for alpha is 12345. The pass key for beta is 2.",
        np.uint8,
    )
    got = find_needle(tokens, "alpha")
    assert (got.position, got.digits) == (7, "12345")
    with pytest.raises(UserError, match="beta is 1 at byte 40 and 2 at byte"):
        find_needle(tokens, "beta")
    with pytest.raises(UserError, match="no pass key for alpa: .* nearest words: alpha$"):
        find_needle(tokens, "alpa")
    with pytest.raises(UserError, match="no pass key for alpha: no line says"):
        find_needle(tokens[:20], "alpha")
