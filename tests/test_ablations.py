"""Ablations: their runs have names, the model is as small as it says, and each of them runs."""

import importlib
import math
import pkgutil

import pytest

from experiments import ablations
from experiments.ablations.small import model_of
from kimijax.metrics import describe
from kimijax.sweep import Done
from kimijax.sweep.settings import by_name

NAMES = [m.name for m in pkgutil.iter_modules(ablations.__path__) if m.name != "small"]


def module(name):
    return importlib.import_module(f"experiments.ablations.{name}")


@pytest.mark.parametrize("name", NAMES)
def test_runs_have_names(name):
    settings = list(module(name).runs([]))
    assert len(by_name(settings)) == len(settings) >= 2


def test_the_model_is_small():
    assert describe(model_of())["parameters"] <= 400_000


def test_seeds_follow_the_best_rate():
    muonclip = module("muonclip")
    first = list(muonclip.runs([]))
    done = [Done(s, {"loss": abs(math.log(s["lr"] / 0.04))}) for s in first]
    more = list(muonclip.runs(done))[len(first):]
    assert {(s["lr"], s["seed"]) for s in more} == {
        (lr, seed) for lr in (0.032, 0.048) for seed in (1, 2)}
    assert {s["optimizer"] for s in more} == {"adamw", "muonclip"}
    assert list(muonclip.runs(done[:-1]))[len(first):] == [
        s for s in more if s["optimizer"] == "adamw"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_runs(name, tmp_path, monkeypatch):
    experiment = module(name)
    for steps in ("STEPS", "MORE"):
        if hasattr(experiment, steps):
            monkeypatch.setattr(experiment, steps, 2)
    monkeypatch.setattr("experiments.ablations.small.STEPS", 2)
    result = experiment.run(next(iter(experiment.runs([]))), tmp_path / "run")
    assert result and all(math.isfinite(x) for x in result.values() if isinstance(x, float))
