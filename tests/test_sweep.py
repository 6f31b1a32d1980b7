"""Sweeps: combinations, what is done is not done again, crashes and interrupts leave the rest."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kimijax.errors import UserError
from kimijax.sweep import Done, product, together
from kimijax.sweep.settings import by_name, name_of
from kimijax.sweep.table import by_settings, markdown

# A sweep whose runs do what their settings say: nothing is compiled. `more` depends on results.
SWEEP = '''
import time
from pathlib import Path
from kimijax.sweep import Plot, Sweep, main, product

def runs(done):
    yield from product(kind=["good", "slow"], seed=[0, 1])
    if (Path(__file__).parent / "crash").exists():
        yield {"kind": "crash", "seed": 0}
    best = [d for d in done if d.settings["kind"] == "good"]
    if len(best) == 2:
        yield {"kind": "more", "seed": int(best[0].result["value"])}

def run(settings, out):
    with (out / "began").open("a") as f:
        f.write("x")
    if settings["kind"] == "crash":
        raise RuntimeError("as asked")
    here = Path(__file__).parent
    while settings["kind"] == "slow" and (here / "hold").exists():
        time.sleep(0.05)
    return {"value": settings["seed"] + 1.0, "name": "x"}

if __name__ == "__main__":
    main(Sweep(runs, run, plots=(Plot(x="kind", y="value"),)), __doc__)
'''


@pytest.fixture
def sweep(tmp_path):
    """Start the command with arguments."""
    (tmp_path / "small_sweep.py").write_text(SWEEP)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])

    def start(*args):
        return subprocess.Popen(
            [sys.executable, "-m", "small_sweep", "--out", str(tmp_path / "out"), *args],
            env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )

    return start


def test_combinations():
    assert product(together(a=[1, 2], b=[3, 4]), c=[5, 6]) == [
        {"a": 1, "b": 3, "c": 5}, {"a": 1, "b": 3, "c": 6},
        {"a": 2, "b": 4, "c": 5}, {"a": 2, "b": 4, "c": 6},
    ]
    with pytest.raises(ValueError):
        together(a=[1], b=[1, 2])
    assert name_of({"lr": 0.01, "kind": "a/../b c", "n": None}) == "lr=0.01,kind=a_.._b_c,n=null"
    with pytest.raises(UserError, match="both called"):
        by_name([{"a": "x/y"}, {"a": "x y"}])
    with pytest.raises(UserError, match="shorter names"):
        name_of({"a" * 300: 1})


def test_seeds_are_averaged():
    done = [Done({"rank": r, "seed": s}, {"loss": r + s, "note": "x"}) for r in (1, 2)
            for s in (0, 2)]
    groups = by_settings(done)
    assert [(g["rank"], m["loss"].mean, m["loss"].seeds) for g, m in groups] == [
        (1, 2, 2), (2, 3, 2)]
    assert groups[0][1]["loss"].deviation == pytest.approx(2**0.5)
    assert markdown(groups).splitlines()[2] == "| 1 | 2 ± 1.4 | 2 |"


def test_a_sweep_is_interrupted_crashes_and_goes_on(sweep, tmp_path):
    hold, out = tmp_path / "hold", tmp_path / "out"
    hold.touch()
    (tmp_path / "crash").touch()
    began = out / "kind=slow,seed=0" / "began"
    first = sweep("--jobs", "2")
    while not began.exists():
        assert first.poll() is None
        time.sleep(0.05)
    other = sweep("--only", "kind=slow,seed=0")
    assert "another process is at this run" in other.communicate()[1] and other.returncode == 2
    first.send_signal(signal.SIGINT)
    said, _ = first.communicate(timeout=20)
    assert first.returncode == 130 and "the same command goes on" in said
    assert (out / "kind=good,seed=0" / "result.json").exists()
    assert not (out / "results.json").exists()
    hold.unlink()

    second = sweep("--jobs", "2")
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 1
    assert "failed: kind=crash,seed=0 (exit 1): RuntimeError: as asked" in said
    results = json.loads((out / "results.json").read_text())
    assert [r["settings"]["kind"] for r in results["runs"]] == ["good"] * 2 + ["slow"] * 2 + [
        "more"]  # the last one was asked for by a result
    assert results["runs"][-1]["settings"]["seed"] == 1
    assert (out / "kind=good,seed=0" / "began").read_text() == "x"  # not run again
    assert began.read_text() == "xx"
    assert (out / "results.csv").read_text().startswith("kind,seed,value,name\n")
    assert (out / "value_by_kind.png").stat().st_size > 1000
    assert "| good | 1.5 ± 0.71 | 2 |" in (out / "results.md").read_text()


def test_lines_for_launchers_and_bad_arguments(sweep, tmp_path):
    lines = {kind: sweep("--dry_run", kind).communicate()[0].splitlines()
             for kind in ("local", "slurm", "xpk")}
    assert [len(x) for x in lines.values()] == [4, 4, 4]
    assert lines["local"][0].startswith("python -m small_sweep --out ")
    assert lines["local"][0].endswith("--only kind=good,seed=0")
    assert "sbatch --job-name=kind-good-seed-0 --output=" in lines["slurm"][0]
    assert "--workload=kind-good-seed-0 --command='python -m" in lines["xpk"][0]
    assert not (tmp_path / "out").exists()
    for args, message in ((("--only", "kind=bad"), "there is no such run; there are kind=good"),
                          (("--jobs", "0"), "--jobs must be 1 or more")):
        process = sweep(*args)
        _, said = process.communicate()
        assert process.returncode == 2 and message in said and said.count("\n") == 1
