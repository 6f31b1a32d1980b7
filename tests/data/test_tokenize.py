"""A dataset is its documents one by one, however they lie in files and however many processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kimijax.data.dataset import Options, open_dataset, split_by, tokenize
from kimijax.data.documents import inputs, text
from kimijax.data.documents.read import Fields
from kimijax.data.tokenizer import load_tokenizer
from tests.data.files import contents, texts, write

ROOT = Path(__file__).parents[2]


def all_of(dataset):
    """The ids of every document."""
    return [x.tolist() for x in dataset.read([(i, 0, n) for i, n in enumerate(dataset.lengths)])]


def test_every_kind_of_file_gives_the_same_documents(tmp_path, rng, model_dir):
    said = texts(rng, 7)
    rows = [{"body": x, "tongue": "de" if i % 2 else "en"} for i, x in enumerate(said)]
    for i, x in enumerate(said):
        write(tmp_path / f"text/deep/{i}.txt", x)
        write(tmp_path / f"packed/{i}.gz", x)
    write(tmp_path / "lines/a.jsonl", rows[:4])
    write(tmp_path / "lines/b.jsonl.gz", rows[4:])
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=3)
    codec = load_tokenizer(model_dir)
    want = [[*codec.encode(x), codec.eos[0]] for x in said]
    options = Options(fields=Fields(text="body", language="tongue"))
    for name in ("text", "packed", "lines", "rows.parquet"):
        tokenize([tmp_path / name], tmp_path / f"{name}.out", model_dir, options=options)
        dataset = open_dataset(tmp_path / f"{name}.out")
        assert all_of(dataset) == want
        assert dataset.info.sources[0].name == name
        assert dataset.info.sources[0].bytes == sum(len(x.encode()) for x in said)
        if name in ("lines", "rows.parquet"):
            parts = split_by(dataset, "language")
            assert all_of(parts["en"]) == want[::2] and all_of(parts["de"]) == want[1::2]
            counts = {x.name: (x.documents, x.tokens) for x in dataset.info.languages}
            assert counts == {"en": (4, sum(map(len, want[::2]))),
                              "de": (3, sum(map(len, want[1::2])))}


def test_a_long_text_is_one_document_whatever_its_pieces(
    tmp_path, rng, monkeypatch, kimijax, model_dir
):
    monkeypatch.setattr(inputs, "PIECE", 1000)
    monkeypatch.setattr(text, "PIECE", 1000)
    monkeypatch.setattr(text, "REACH", 64)
    long = "".join(texts(rng, 30, 100)) + "长" * 900 + "\n" + "x" * 2000  # no line end for long
    for name in ("long", "packed.gz"):
        write(tmp_path / name / name, long)
        tokenize([tmp_path / name], tmp_path / f"{name}.out")
        dataset = open_dataset(tmp_path / f"{name}.out")
        assert dataset.info.documents == 1 and dataset.info.bad == 0
        assert bytes(all_of(dataset)[0]) == long.encode()
    tokenize([tmp_path / "long"], tmp_path / "ended.out", model_dir)
    (ids,) = all_of(open_dataset(tmp_path / "ended.out"))
    assert load_tokenizer(model_dir).decode(ids) == long + "<eos>" and ids.count(0) == 1
    lines = [{"text": x} for x in texts(rng, 40, 60)]
    write(tmp_path / "many.jsonl", lines)
    assert len(list(inputs._units(inputs.find_inputs([tmp_path / "many.jsonl"])[0]))) > 5
    tokenize([tmp_path / "many.jsonl"], tmp_path / "many.out")
    got = [bytes(x).decode() for x in all_of(open_dataset(tmp_path / "many.out"))]
    assert got == [x["text"] for x in lines]
    write(tmp_path / "faulty.jsonl", [*lines[:29], {"txt": ""}, *lines])
    code, _, errors = kimijax("tokenize", tmp_path / "faulty.jsonl", "--out", tmp_path / "faulty")
    assert code == 2 and "faulty.jsonl: line 30 lacks the field 'text'" in errors


def test_empty_and_faulty_documents_are_left_out_and_counted(tmp_path, kimijax):
    write(tmp_path / "in/a.jsonl", [{"text": "one"}, {"text": ""}, {"other": 1}, {"text": "two"}])
    write(tmp_path / "in/b.txt", b"\xff\xfe")
    write(tmp_path / "in/.hidden/c.txt", "hidden")
    out = tmp_path / "out"
    code, said, _ = kimijax("tokenize", tmp_path / "in", "--out", out, "--bad_lines", "skip",
                            "--jobs", 1)
    assert code == 0 and "1 empty" in said and "2 faulty" in said
    dataset = open_dataset(out)
    assert (dataset.info.documents, dataset.info.empty, dataset.info.bad) == (2, 1, 2)
    assert all_of(dataset) == [list(b"one"), list(b"two")]
    write(tmp_path / "none.jsonl", [{"text": ""}])
    code, _, errors = kimijax("tokenize", tmp_path / "none.jsonl", "--out", tmp_path / "none")
    assert code == 2 and "error: no document is left of 1: 0 are faulty" in errors


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A directory of some forty parts and the dataset that one process makes of it."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("many")
    for i in range(40):
        write(root / f"in/{i:02}.jsonl", [{"text": x} for x in texts(rng, 40, 700)])
    tokenize([root / "in"], root / "want")
    return root


def test_two_processes_make_the_same_dataset(many, tmp_path):
    tokenize([many / "in"], tmp_path / "out", jobs=2)
    assert contents(tmp_path / "out") == contents(many / "want")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_is_gone_on_with(many, tmp_path, how):
    out, work = tmp_path / "out", tmp_path / "out.partial"
    # A shell's background jobs, as these tests may be, ignore SIGINT, and so would their child.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{listen}; from kimijax import cli; cli.run()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "tokenize", many / "in", "--out", out, "--jobs", "2"],
        cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True,
    ) as process:
        while len(list(work.glob("*.npz"))) < 3:
            assert process.poll() is None
            time.sleep(0.001)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        # Ctrl-C in a terminal reaches workers too.
        (os.kill if how == signal.SIGKILL else os.killpg)(process.pid, how)
        assert process.wait(30) == {signal.SIGKILL: -9, signal.SIGINT: 130}[how]
        assert b"Traceback" not in process.stderr.read()
    for child in children:  # none goes on alone
        while state(child) not in ("Z", None):
            time.sleep(0.01)
    done = len(list(work.glob("*.npz")))
    assert done >= 3 and not out.exists()
    seen = []
    tokenize([many / "in"], out, on_part=lambda *x: seen.append(x[3]))
    total = len(inputs.deal(inputs.find_inputs([many / "in"])))
    assert done < total
    assert (seen.count(False), seen.count(True)) == (done, total - done)
    assert contents(out) == contents(many / "want") and not work.exists()


def state(pid):
    """The state of a process, None: there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def test_what_was_begun_otherwise_is_refused(tmp_path, kimijax, model_dir):
    write(tmp_path / "in/a.jsonl", [{"text": "x" * 70_000}])
    write(tmp_path / "in/b.jsonl", [{"text": "y" * 70_000}, {}])
    args = "tokenize", tmp_path / "in", "--out", tmp_path / "out", "--jobs", 1
    assert kimijax(*args)[0] == 2  # at b's second line, when a is done
    assert len(list((tmp_path / "out.partial").glob("*.npz"))) == 1
    for more, what in ((("--tokenizer", model_dir), "tokenizer"),
                       (("--text_field", "other"), "options")):
        code, _, errors = kimijax(*args, *more)
        assert code == 2 and f"(different: {what})" in errors and errors.count("\n") == 1
    assert kimijax(*args, "--bad_lines", "skip")[0] == 0  # what is done is right with it
    os.rename(tmp_path / "out", tmp_path / "moved")
    write(tmp_path / "in/c.jsonl", [{}])
    assert kimijax(*args)[0] == 2
    write(tmp_path / "in/c.jsonl", [{"text": "more"}])
    code, _, errors = kimijax(*args)
    assert code == 2 and "(different: inputs)" in errors


@pytest.mark.parametrize(
    "name, content, fault",
    [
        ("a.jsonl", '{"text": "good"}\n\n{"text"', "a.jsonl: line 3 is not JSON"),
        ("a.jsonl", '["text"]', "a.jsonl: line 1 is not an object but ['text']"),
        ("a.jsonl", [{"text": "x"}, {"body": "x"}], "a.jsonl: line 2 lacks the field 'text'"),
        ("a.jsonl", [{"text": 3}], "line 1 has 3 as 'text', which must be text"),
        ("a.jsonl", [{"text": "x", "lang": ["de"]}], "line 1 has ['de'] as 'lang'"),
        ("a.jsonl", '{"text": "\\ud800"}', "line 1 holds a lone surrogate in 'text'"),
        ("a.jsonl", "[" * 100_000, "a.jsonl: line 1 is nested too deep"),
        ("a.jsonl", b"\xff{}", "a.jsonl: line 1 is not JSON"),
        ("a.txt", b"ok \xff", "a.txt is not UTF-8"),
        ("a.txt", b"", "no documents in it"),
        ("a.parquet", b"PAR1 no", "a.parquet: is no Parquet file that can be read"),
        ("a.parquet.gz", b"x", "a.parquet.gz: Parquet cannot be read through gzip"),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path, kimijax, name, content, fault):
    write(tmp_path / "in" / name, content)
    code, _, errors = kimijax("tokenize", tmp_path / "in", "--out", tmp_path / "out", "--jobs", 1)
    assert code == 2 and fault in errors, errors
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_other_refusals(tmp_path, kimijax, monkeypatch):
    good = write(tmp_path / "in/a.txt", "text").parent
    (tmp_path / "broken.gz").write_bytes(b"\x1f\x8b broken")
    write(tmp_path / "other/in/b.txt", "text")
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    out = "--out", tmp_path / "out"
    for args, fault in (
        ([tmp_path / "none", *out], "none: cannot be read: No such file or directory"),
        ([tmp_path / "broken.gz", *out], "broken.gz: cannot be read"),
        ([good, tmp_path / "other/in", *out], "a second source named 'in'"),
        ([good, "--out", good], "exists already; remove it or name another --out"),
        ([good, "--out", "/dev/null/x"], "/dev/null/x.partial: cannot be written: Not a"),
        ([good, *out, "--jobs", 0], "--jobs 0: must be at least 1"),
        ([good, *out, "--tokenizer", tmp_path / "none"], "none: does not exist"),
        ([tmp_path / "a.parquet", *out], "has no column 'text' but body, n"),
        ([tmp_path / "a.parquet", *out, "--text_field", "n"], "row 0 of row group 0 has 1 as 'n'"),
    ):
        code, _, errors = kimijax("tokenize", *args, *([] if "--jobs" in args else ["--jobs", 1]))
        assert code == 2 and fault in errors and errors.count("\n") == 1, errors
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    code, _, errors = kimijax("tokenize", tmp_path / "a.parquet", *out)
    assert code == 2 and "pip install kimijax[train]" in errors


def test_json_values_of_the_dataset(tmp_path):
    write(tmp_path / "in/a.txt", "text")
    tokenize([tmp_path / "in"], tmp_path / "out")
    data = json.loads((tmp_path / "out/dataset.json").read_text())
    assert data["tokens"] == 4 and data["vocab"] == 256 and data["dtype"] == "uint16"
    assert data["sources"] == [{"name": "in", "documents": 1, "tokens": 4, "bytes": 4}]
