"""A run that is kept in a bucket: what it is on a disk, whatever happens to it."""

import json
import sys

import numpy as np
import pytest

from kimijax.checkpoint import restore_latest, save_model
from kimijax.checkpoint.places import locate
from kimijax.commands.paths import writable
from kimijax.errors import UserError
from kimijax.train import Saves, fit
from kimijax.train.log import read_log
from tests import bucket as buckets
from tests.conftest import model_and_params
from tests.toy import STEPS, phases, start, step

RUN = "gs://bkt/runs/toy"
HOURS = ("seconds", "tokens_per_second")


@pytest.fixture
def held():
    with buckets.bucket() as objects:
        yield objects


class Stopped(Exception):
    """In the place of a kill."""


def run(out, stop_at: int | None = None, **options):
    """The toy's run, saved every third step; stopped after so many."""
    parts = phases()

    def stopping(state, batch):
        if int(state.step) == stop_at:
            raise Stopped
        return step(state, batch, rate=0.1)

    if stop_at is not None:
        parts[0] = parts[0]._replace(step=stopping)
    return fit(start(), parts, out, {"a": 1}, saves=Saves(every=3), **options)


def said(out) -> list[dict]:
    lines = read_log(locate(out) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in HOURS} for line in lines]


def names(held: dict, below: str = "bkt/runs/toy/state/") -> set[str]:
    return {name[len(below) :].partition("/")[0] for name in held if name.startswith(below)}


def test_a_run_in_a_bucket_is_the_run_on_a_disk(held, tmp_path):
    want = run(tmp_path)
    with pytest.raises(Stopped):
        run(RUN, stop_at=7)
    assert names(held) == {"step_00000003", "step_00000006"}
    kept = json.loads(held["bkt/runs/toy/run.json"])
    assert kept == {"a": 1} and len(said(RUN)) == 6
    got = run(RUN, profile=range(9, 10), tensorboard=True)
    np.testing.assert_array_equal(got.params["w"], want.params["w"])
    assert said(RUN) == said(tmp_path) and len(said(RUN)) == sum(STEPS)
    assert names(held) == {"step_00000021", "step_00000024"}
    found, wanted = (restore_latest(locate(x) / "state", start()) for x in (RUN, tmp_path))
    assert (found.step, found.beside) == (wanted.step, wanted.beside)
    np.testing.assert_array_equal(found.state.params["w"], wanted.state.params["w"])
    assert any(x.startswith("bkt/runs/toy/profile/") and x.endswith(".xplane.pb") for x in held)
    assert any(x.startswith("bkt/runs/toy/tensorboard/events") for x in held)
    with pytest.raises(UserError, match="gs://bkt/runs/toy holds another run"):
        fit(start(), phases(), RUN, {"a": 2})


def test_what_a_save_left_unfinished_is_no_checkpoint(held):
    with pytest.raises(Stopped):
        run(RUN, stop_at=7)
    del held["bkt/runs/toy/state/step_00000006/manifest.json"]
    assert restore_latest(f"{RUN}/state", start()).step == 3
    held["bkt/runs/toy/state/notes/mine"] = b"stays"
    held["bkt/runs/toy/state/step_00000002/leaves.json"] = b"goes"
    with pytest.raises(Stopped):
        run(RUN, stop_at=10)
    assert names(held) == {"step_00000006", "step_00000009", "notes"}
    for name in [x for x in held if "/step_" in x and x.endswith("manifest.json")]:
        del held[name]
    assert restore_latest(f"{RUN}/state", start()) is None  # the first save came to no end
    with pytest.raises(Stopped):
        run(RUN, stop_at=4)
    assert names(held) == {"step_00000003", "notes"}


def test_a_flipped_byte_is_found(held, capsys):
    with pytest.raises(Stopped):
        run(RUN, stop_at=7)
    largest = max((x for x in held if "/step_00000006/" in x), key=lambda x: len(held[x]))
    data = bytearray(held[largest])
    data[len(data) // 2] ^= 1
    held[largest] = bytes(data)
    assert restore_latest(f"{RUN}/state", start()).step == 3
    assert "step_00000006: differs from its manifest.json in" in capsys.readouterr().err


def test_a_model_in_a_bucket_is_the_one_on_a_disk(held, tmp_path):
    model, params = model_and_params("needle")
    for where in (tmp_path, "gs://bkt/model"):
        save_model(where, model.cfg, params["params"])
    assert {x: held[f"bkt/model/{x}"] for x in ("config.json", "model.safetensors")} == {
        x.name: x.read_bytes() for x in tmp_path.iterdir()}


def test_where_a_run_may_be_kept(held, monkeypatch):
    assert str(writable(RUN, bucket=True)) == RUN and not held
    with pytest.raises(UserError, match="is in a bucket; this command writes to a file system"):
        writable(RUN)
    monkeypatch.delenv(buckets.URL)
    monkeypatch.setenv(buckets.URL, "http://127.0.0.1:9")
    with pytest.raises(UserError, match=f"--out {RUN} cannot be written: "):
        writable(RUN, bucket=True)


def test_a_bucket_needs_what_reaches_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match="a bucket needs gcsfs: pip install"):
        locate(RUN)
