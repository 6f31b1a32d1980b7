"""Pre-training: phases of a curriculum, one schedule, rotary positions stretched where it says."""

import json
import math

import pytest

from experiments import pretrain
from experiments.curricula import k2, learning_rate, stretched, tiny
from kimijax import presets
from kimijax.errors import UserError


def test_one_learning_rate_goes_through_all_phases():
    stages = k2()
    rate, ends = learning_rate(stages), [0]
    for stage in stages:
        ends.append(ends[-1] + stage.steps)
    assert math.isclose(rate(250), 1e-4, rel_tol=1e-5)
    for i, stage in enumerate(stages):
        assert math.isclose(rate(ends[i + 1] - 1), stage.final, rel_tol=1e-2)
        if not stage.warmup:
            assert math.isclose(rate(ends[i]), stage.rate, rel_tol=1e-5)
    tokens = sum(s.steps * s.rows * s.length for s in stages[:2])
    assert 15.4e12 < tokens < 15.6e12


def test_positions_are_stretched_in_the_last_phase():
    cfg, stages = presets.kimi_k2(), k2()
    yarns = [stretched(cfg, stages, s).layers[1].mixer.rope.yarn for s in stages]
    assert yarns[:-1] == [None] * 4
    assert yarns[-1] == cfg.layers[1].mixer.rope.yarn  # as it is released


def test_weights_of_data():
    assert pretrain.weights_of("a=2,b") == {"a": 2.0, "b": 1.0}
    for bad in ("a=x", "a=-1", "=2", "a=0"):
        with pytest.raises(UserError, match="--data"):
            pretrain.weights_of(bad)


@pytest.mark.slow
def test_a_run_goes_through_its_phases(tmp_path, monkeypatch):
    import argparse
    import dataclasses

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stages = tuple(dataclasses.replace(s, steps=2, warmup=0) for s in tiny())
    monkeypatch.setitem(pretrain.CURRICULA, "tiny", lambda: stages)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("def f(x):\n    return x + 1\n" * 400)
    parser = argparse.ArgumentParser()
    pretrain.add_arguments(parser)
    text, out = str(tmp_path / "texts"), tmp_path / "run"
    args = parser.parse_args([
        "--model", "kimi_k2_tiny", "--curriculum", "tiny", "--data", text, "--eval", text,
        "--out", str(out), "--mesh", "seq=2",
    ])
    assert pretrain.main(args) == 0
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert [x["phase"] for x in lines] == [
        f"{i}-{s.length}" for i, s in enumerate(stages) for _ in range(2)]
    assert all("eval_loss" in x for x in lines[1::2])
    assert (out / "model" / "model.safetensors").exists()
