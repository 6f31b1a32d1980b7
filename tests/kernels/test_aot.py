"""Kernels compile for TPUs; what is read from their schedules is what they do; failures say why."""

import importlib.metadata
import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from kernels_pallas import aot, bench
from kernels_pallas.aot import __main__ as check
from kernels_pallas.aot import child
from kernels_pallas.latent_decode import cases as latent_decode_cases
from tests.kernels import aot_kernels

CHIP = "v5p"
CI = child.jobs({op: [cases.__name__] for op, cases in bench.OPS.items()}, [CHIP], "ci")
OURS = child.jobs({"test": [aot_kernels.__name__]}, [CHIP])
compiler = pytest.mark.skipif(aot.available() is not None, reason=str(aot.available()))


@pytest.fixture(scope="module")
def compiled():
    """Results of the ops' cases for CI by (op, case, impl)."""
    return {r.job: r for r in child.run(CI, schedules=False)}


@pytest.fixture(scope="module")
def results():
    """Results of the kernels beside this file, by case."""
    return {r.job.case: r for r in child.run(job for job in OURS if job.case != "hang")}


@compiler
@pytest.mark.parametrize("job", CI, ids=lambda job: f"{job.op} {job.case} {job.impl}")
def test_an_op_compiles(job, compiled):
    assert compiled[job].error is None


@compiler
def test_a_stack_of_matrices_is_not_copied(compiled):
    """Of 1.3 GiB and less: no layer of it is sliced out, no scales are laid out anew."""
    stacks = [r for job, r in compiled.items() if job.case == "few, one layer of 4"]
    assert len(stacks) == 4
    for r in stacks:
        assert r.figures["temp_bytes"] < 8 * 2**20, r.job


@compiler
def test_the_inner_block_is_found_and_its_products_are_counted(results):
    got = results["product"].figures
    # 512^3 MACs, 4 MXUs of 128 x 128: the compiler counts exactly these cycles as busy.
    assert got["mxu_occupancy"] * got["cycles"] == pytest.approx(512**3 / (4 * 128**2))
    assert got["useful_mxu"] == got["mxu_occupancy"]
    assert 2048 < got["cycles"] < 2500 < got["bundles"]  # not what lies around the branch
    assert got["block_cycles"] == [got["cycles"]]
    # Two buffers of both inputs; the output is revisited, a second buffer is the compiler's choice.
    assert got["vmem_bytes"] >= 2 * 2 * 512 * 512 * 2 + 512 * 512 * 4


@compiler
@pytest.mark.parametrize("case, what", [
    ("scratch", r"VMEM overflow: the scratch operand f32\[131072,1024\].* wants 512.0 MiB, there"),
    ("blocks", "VMEM overflow: the kernel wants 128.00M, its limit is "),
    ("refused", "^NotImplementedError: product.pallas.: 3 heads are odd$"),
    ("death", r"^the compiler died \(7\): Check failed: 1 == 2$"),
    ("no kernel", "has no Pallas kernel named ''"),
    ("wrong macs", r"case.macs=536870912 keep an MXU busy for 32768 .* its blocks do for \[8192\]"),
])
def test_a_failure_is_a_line(case, what, results):
    error = results[case].error
    assert "\n" not in error
    assert re.search(what, error), error


@compiler
def test_a_compiler_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(child, "LIMIT", 8)
    hang, product = (next(j for j in OURS if j.case == case) for case in ("hang", "product"))
    errors = [r.error for r in child.run([hang, product], schedules=False)]
    assert errors == ["not compiled after 8 s", None]


@compiler
def test_two_compilers_work_at_once():
    one = [job for job in OURS if job.case == "product"]
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(lambda _: list(child.run(one)), range(2)))
    assert [r.error for rs in got for r in rs] == [None, None]
    one, other = (
        {k: v for k, v in rs[0].figures.items() if not k.endswith("_seconds")} for rs in got
    )
    assert one == other and "cycles" in one


@compiler
@pytest.mark.parametrize("impl, cycles", [("jax_splash", 1326), ("jax_flash", 1415)])
def test_schedules_of_known_kernels(impl, cycles):
    """The figures of libtpu 0.0.52 for jax's own kernels, read by another program before."""
    version = importlib.metadata.version("libtpu")
    if version != "0.0.52":
        pytest.skip(f"cycles belong to libtpu 0.0.52, this is {version}")
    job = child.Job("attention", bench.PEERS["attention"][0], "128/128 masked", impl, CHIP)
    (got,) = child.run([job])
    assert got.figures["cycles"] == cycles


@compiler
def test_the_bench_writes_rows(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "OPS", {"test": aot_kernels})
    assert bench.main(["--aot", CHIP, "test", "--json", str(tmp_path / "rows")]) == 0
    (row,) = json.loads((tmp_path / "rows").read_text())["rows"]
    want = {"op": "test", "case": "product", "impl": "pallas", "dims": "512", "chip": CHIP}
    assert row | want == row
    assert row["roofline"] == row["useful_mxu"] and row["bound"] == "MXU"
    assert {"cycles", "mxu_occupancy", "useful_mxu", "spills", "vmem_bytes", "bundles"} < set(row)
    assert str(row["cycles"]) in capsys.readouterr().out


@compiler
def test_the_check_counts_what_failed(monkeypatch, capsys):
    monkeypatch.setattr(check, "OPS", {"test": aot_kernels})
    monkeypatch.setattr(aot_kernels, "AOT", dict(list(aot_kernels.AOT.items())[:2]))
    assert check.main(["--chips", CHIP]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].split()[-6:] == ["lower", "s", "compile", "s", "VMEM", "MiB"]
    lower, build, vmem = map(float, said[1].split()[-3:])
    assert lower > 0 and build > 0 and vmem > 0
    assert "FAILED VMEM" in said[2] and said[3] == "1 of 2 compiled"


def test_wrong_names_are_named(capsys):
    assert bench.main(["attentoin"]) == 2
    assert bench.main(["--aot", "v9"]) == 2
    assert check.main(["--tag", "nothing"]) == 2
    said = capsys.readouterr().err
    assert "no op ['attentoin'], there are ['attention'" in said
    assert "no chip ['v9'], there are ['tpu7x'" in said
    assert "no case tagged nothing" in said


def test_a_missing_compiler_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(aot.CompileError, match="libtpu is not installed: make aot"):
        next(child.run(OURS))


def test_a_roofline_is_the_tighter_bound():
    chip = aot.CHIPS["v5p"]  # 65,536 MACs a cycle; 2765e9 / 2 / 1.751e9 = 789.5 bytes
    case = aot.Case(lambda: None, macs=65536 * 100)
    at = lambda **how: child.roofline(case._replace(**how), chip, 400)  # noqa: E731
    assert at() == {"roofline": 0.25, "bound": "MXU"}
    assert at(moved=789.0 * 90)["bound"] == "MXU"
    got = at(moved=789.5 * 800)
    assert got["bound"] == "HBM" and got["roofline"] == pytest.approx(2, rel=1e-3)
    assert at(macs=None) == {"roofline": None, "bound": None}


def test_bytes_of_a_page_are_those_of_the_call():
    case = latent_decode_cases.AOT["1 of 131,072", "pallas"]
    _, (q, pages, *_) = case.make()
    whole = latent_decode_cases.hbm_bytes(q, pages, pages.pos.size)
    assert case.moved * pages.pos.shape[0] == pytest.approx(whole, rel=5e-3)


def test_clocks_are_those_of_the_chips():
    got = {name: round(chip.clock / 1e9, 2) for name, chip in aot.CHIPS.items()}
    assert got == {"v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "tpu7x": 2.2}
