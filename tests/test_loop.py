"""The loop over phases: resumed anywhere it is the same run, and says exactly what happened."""

import json
import os
import signal
import struct

import grain
import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from kimijax.errors import UserError
from kimijax.train import Interrupted, Numbered, Phase, Saves, fit, read_log
from tests.toy import State, Walk, start, step

TIMES = {"seconds", "tokens_per_second", "mfu"}
NEVER = Saves(seconds=1e9)


def small(state: State, batch):
    """A step without an array worth mentioning."""
    return state._replace(step=state.step + 1), {"loss": batch.sum(), "each": batch}


def numbers(seed: int):
    """grain's: shuffled anew in each epoch, two a batch."""
    data = grain.MapDataset.source(list(range(5))).shuffle(seed).repeat().map(np.float32).batch(2)
    return iter(data.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def phases(stop_at: int | None = None) -> list[Phase]:
    """2 + 3 + 1 steps; the stop is asked for while step `stop_at` runs."""
    seen = []

    def watched(state, batch):
        seen.append(batch)
        if int(state.step) + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return small(state, batch)

    def last(i):
        return np.float32([i, np.inf])

    return [
        Phase("a", 2, watched, lambda: numbers(1), 10),
        Phase("b", 3, watched, lambda: numbers(2), 20),
        Phase("c", 1, watched, lambda: Numbered(last), 40),
    ]


def said(out) -> list[dict]:
    """The lines of the log without times."""
    lines = read_log(out / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def test_a_run_stopped_after_any_step_goes_on_at_the_exact_batch(tmp_path):
    fit(start(), phases(), tmp_path / "whole", {}, saves=NEVER)
    want = said(tmp_path / "whole")
    assert [(w["step"], w["phase"]) for w in want] == [*zip(range(1, 7), "aabbbc", strict=True)]
    first = [next(numbers(2)).tolist(), numbers(1).__next__().tolist()]
    assert [want[2]["each"], want[0]["each"]] == first
    for stop_at in range(1, 6):
        out = tmp_path / str(stop_at)
        with pytest.raises(Interrupted, match=f"after step {stop_at} of 6"):
            fit(start(), phases(stop_at), out, {}, saves=NEVER)
        assert said(out) == want[:stop_at]
        assert int(fit(start(), phases(), out, {}, saves=NEVER).step) == 6
        assert said(out) == want
    with pytest.raises(UserError, match="has done 6 steps, the phases have 2"):
        fit(start(), phases()[:1], tmp_path / "whole", {})


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(tmp_path, capsys):
    fit(start(), phases(), tmp_path, {}, saves=Saves(every=2, keep=3))
    want, log = said(tmp_path), tmp_path / "metrics.jsonl"
    place = tmp_path / "state" / "step_00000006" / "beside_00000.json"
    place.write_bytes(place.read_bytes().replace(b"1", b"2"))
    log.write_text(log.read_text() + '{"step": 7, "lo')  # and a line that a crash cut short
    fit(start(), phases(), tmp_path, {}, saves=NEVER)
    assert said(tmp_path) == want
    assert "differs from its manifest.json in 'beside_00000.json'" in capsys.readouterr().err
    log.write_text("lost\n" + log.read_text())
    with pytest.raises(UserError, match="no log of a run: it has the line 'lost'; remove it"):
        fit(start(), phases(), tmp_path, {})


def test_lines_are_valid_json_with_speed_and_what_is_not_finite(tmp_path):
    said = [phase._replace(flops=1e6) for phase in phases()]
    fit(start(), said, tmp_path, {}, saves=NEVER, peak=1e9)
    refuse = lambda name: pytest.fail(f"{name} is no JSON")  # noqa: E731
    text = (tmp_path / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line, parse_constant=refuse) for line in text]
    assert lines[-1]["each"] == [0.0, "inf"] and lines[-1]["loss"] == "inf"
    assert read_log(tmp_path / "metrics.jsonl")[-1]["each"] == [0.0, np.inf]
    for line, tokens in zip(lines, [10, 10, 20, 20, 20, 40], strict=True):
        assert line["tokens_per_second"] == tokens / line["seconds"]
        assert line["mfu"] == pytest.approx(1e6 / line["seconds"] / 1e9)


def test_metrics_are_those_of_their_step_though_fetched_later(tmp_path):
    phase = Phase("a", 5, lambda s, b: step(s, b, rate=0.1), lambda: Walk(0), 1)
    end = fit(start(), [phase], tmp_path, {}, saves=NEVER)
    state, batches = start(), Walk(0)
    for line in said(tmp_path):
        state, metrics = step(state, next(batches), rate=0.1)
        want = {"step": int(state.step), "phase": "a"} | jax.device_get(metrics)
        assert line == want
    np.testing.assert_array_equal(state.params["w"], end.params["w"])
    assert read_log(tmp_path / "metrics.jsonl")[0]["mfu"] is None


def test_evaluations_see_the_state_after_their_step(tmp_path):
    a, b, c = phases()
    evaluate = lambda state: {"loss": int(state.step) * 1.5}  # noqa: E731
    said_b = b._replace(steps=5, evaluate=evaluate, every=2)
    fit(start(), [a, said_b, c], tmp_path, {}, saves=NEVER)
    found = {x["step"]: x["eval_loss"] for x in said(tmp_path) if "eval_loss" in x}
    assert found == {4: 6.0, 6: 9.0, 7: 10.5}  # every second step of the phase, and its last


def test_data_that_end_too_early_are_named(tmp_path):
    data = grain.MapDataset.source(np.ones((2, 1), np.float32))
    phase = Phase("text", 3, small, lambda: iter(data.to_iter_dataset()), 1)
    with pytest.raises(UserError, match="phase text: there is no batch for step 3; give"):
        fit(start(), [phase], tmp_path, {})
    assert len(said(tmp_path)) == 2


def test_saves_are_made_and_kept_as_asked(tmp_path):
    phase = Phase("a", 11, small, lambda: Walk(0), 1)
    fit(start(), [phase], tmp_path, {}, saves=Saves(every=2, keep=2, keep_every=3))
    kept = sorted(int(path.name[5:]) for path in (tmp_path / "state").iterdir())
    assert kept == [3, 6, 9, 10, 11]
    for wrong in ({"keep": 0}, {"every": -1}, {"keep_every": -1}):
        with pytest.raises(UserError, match=f"{[*wrong][0]} = "):
            Saves(**wrong)


def events(folder) -> list[list[Event]]:
    """Of every file of TensorBoard's, in order: length, its checksum, the event, its checksum."""
    found = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, file = path.read_bytes(), []
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            file.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
        found.append(file)
    return found


def test_tensorboard_shows_every_step_once_after_a_crash(tmp_path, monkeypatch):
    """The state of step 2 is saved, steps 3 and 4 are done twice."""

    def crash(state):
        raise ZeroDivisionError

    crashing = phases()
    crashing[1] = crashing[1]._replace(evaluate=crash, every=2)
    with pytest.raises(ZeroDivisionError):
        fit(start(), crashing, tmp_path, {}, saves=Saves(every=2), tensorboard=True)
    fit(start(), phases(), tmp_path, {}, saves=NEVER, tensorboard=True)
    shown = []  # as TensorBoard reads: what lies at or after a start was not meant
    for file in events(tmp_path / "tensorboard"):
        for event in file:
            if event.HasField("session_log"):
                shown = [(at, value) for at, value in shown if at < event.step]
            shown += [(event.step, v.simple_value) for v in event.summary.value if v.tag == "loss"]
    assert shown == [(line["step"], line["loss"]) for line in said(tmp_path)]
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"pip install 'kimijax\[train\]'"):
        fit(start(), phases(), tmp_path, {}, tensorboard=True)


@pytest.mark.parametrize("steps", [range(2, 4), range(6, 9)])
def test_a_range_of_steps_is_traced(tmp_path, steps):
    fit(start(), phases(), tmp_path, {}, saves=NEVER, profile=steps)
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
