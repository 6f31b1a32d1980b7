"""The page of experiments.plan_2m against the planner's searches and against plain arithmetic."""

import argparse
import dataclasses
import json
import re
from pathlib import Path

import pytest

from experiments import plan_2m, plan_page
from kimijax.config import CompressedConfig, KDAConfig
from kimijax.errors import UserError
from kimijax.metrics import describe
from kimijax.parallel.mesh import parse_mesh
from kimijax.planner import search, work
from kimijax.planner.chips import CHIPS, pod_of, pods
from kimijax.planner.estimate import estimate
from kimijax.planner.job import Job

ROOT = Path(__file__).parents[1]
N = 2**21
MODELS = ("moonlight_16b", "kimi_linear_48b")


@pytest.fixture(scope="module")
def facts():
    """Two models at one length."""
    return {
        "models": {name: plan_2m.about(name) for name in MODELS},
        "rows": [row for name in MODELS for row in plan_2m.rows(name, [N])],
    }


def of(facts, **wanted):
    """The rows with these values."""
    return [r for r in facts["rows"] if all(r[k] == v for k, v in wanted.items())]


@pytest.mark.parametrize("model, chip", [("moonlight_16b", "v5e"), ("kimi_linear_48b", "v5p")])
def test_a_row_is_what_the_planner_says_and_one_slice_less_does_not_fit(facts, model, chip):
    for row in of(facts, model=model, attention="exact", chip=chip):
        job = Job(plan_2m.model_of(model), row["job"], N, chunk=row["chunk"])
        e = estimate(job, pod_of(row["topology"]), parse_mesh(row["mesh"]), row["strategy"])
        assert row["fits"] and row["seconds"] == e.time
        assert row["bytes_per_chip"] == pytest.approx(e.bytes) and e.bytes <= row["memory_per_chip"]
        chunks = (None, 4096, 16_384, 65_536) if row["job"] == "prefill" else (None,)
        jobs = [dataclasses.replace(job, chunk=n) for n in chunks]
        shapes = [p.topology for p in pods(chip)]
        if before := shapes[: shapes.index(e.pod.topology)]:
            for other in jobs:
                with pytest.raises(UserError, match="does not fit"):
                    search.best(other, pod_of(before[-1]))
        for other in (search.best(x, e.pod) for x in jobs if fits(x, e.pod)):
            assert e.time <= search.SAME * other.time
            assert other.time > e.time or other.bytes >= e.bytes


def fits(job, pod):
    """On some mesh."""
    return any(e.fits for e in search.candidates(job, pod, search.meshes(job, pod)))


def test_a_row_is_read_in_chunks_where_that_takes_fewer_chips(facts):
    row = of(facts, model="kimi_linear_48b", attention="exact", job="prefill", chip="v5p")[0]
    job = Job(plan_2m.model_of("kimi_linear_48b"), "prefill", N)
    assert row["chunk"] == 16_384 and row["chips"] < search.smallest(job, "v5p").pod.chips
    cache = facts["models"]["kimi_linear_48b"]["cache_bytes_per_token"]["exact"] * N
    assert row["bytes_per_chip"] > cache / row["chips"] and "cache_bytes_per_chip" not in row


def test_a_chunk_is_of_prefill_and_no_longer_than_the_context():
    cfg = plan_2m.model_of("moonlight_16b")
    short = plan_2m.in_chunks(Job(cfg, "prefill", 16_384))
    assert [job.chunk for job in short] == [None, 4096, 16_384]
    assert plan_2m.in_chunks(Job(cfg, "decode", N)) == [Job(cfg, "decode", N)]


def test_no_row_is_faster_than_what_it_must_read_and_multiply(facts):
    assert not of(facts, fits=False)
    for r in facts["rows"]:
        cfg = plan_2m.model_of(r["model"], r["attention"])
        job, chip = Job(cfg, r["job"], N), CHIPS[r["chip"]]
        pod = pod_of(r["topology"])
        flops = sum(work.flops_per_token(job).values())
        assert r["tokens_per_second"] * flops <= 1.001 * pod.flops * pod.devices
        assert r["bytes_per_chip"] <= chip.memory * chip.devices == r["memory_per_chip"]
        if r["job"] == "decode":
            size = describe(cfg)
            active = size["active_parameters_without_embedding"] + cfg.vocab * cfg.width
            cache = facts["models"][r["model"]]["cache_bytes_per_token"][r["attention"]] * N
            read = 2 * active + (0 if r["attention"] == "chosen" else cache)
            assert r["seconds"] * pod.bandwidth * pod.devices >= 0.99 * read


def test_an_expanded_cache_has_the_keys_and_values_of_all_heads(facts):
    assert facts["models"]["moonlight_16b"]["cache_bytes_per_token"]["expanded"] == 27 * 16 * 640
    assert facts["models"]["kimi_linear_48b"]["cache_bytes_per_token"]["expanded"] == 7 * 32 * 640
    job = Job(plan_2m.model_of("moonlight_16b"), "decode", N)
    e = estimate(job, pod_of("v5p:2x2x2"), {"data": 1, "seq": 1, "expert": 4, "tensor": 2})
    wide = plan_2m.with_all_heads(e)
    positions = 8 * N  # int32 positions and segments, whole on every device
    assert wide.parts["latents"] == pytest.approx(27 * 16 * 640 * N / 8 + positions, rel=0.001)
    more = wide.bytes - e.bytes
    assert wide.seconds["hbm"] - e.seconds["hbm"] == pytest.approx(more / e.pod.bandwidth)
    for row in of(facts, attention="expanded"):
        slim = of(facts, **{k: row[k] for k in ("model", "chip", "job")}, attention="exact")[0]
        assert row["chips"] >= slim["chips"]
        assert row["seconds"] * row["chips"] > slim["seconds"] * slim["chips"]


def test_chosen_blocks_stand_where_exact_attention_did():
    exact, other = (plan_2m.model_of("kimi_linear_48b", kind) for kind in ("exact", "chosen"))
    assert len(exact.layers) == len(other.layers) == 27
    for layer, new in zip(exact.layers, other.layers, strict=True):
        kept = isinstance(layer.mixer, KDAConfig)
        assert new == (layer if kept else dataclasses.replace(layer, mixer=new.mixer))
        assert kept or isinstance(new.mixer, CompressedConfig)


def test_the_command_writes_a_page_with_every_model_context_and_chip(facts, tmp_path, capsys):
    out = tmp_path / "page"
    args = argparse.Namespace(out=str(out), models="moonlight_16b", contexts=f"{N},4096", json=True)
    assert plan_2m.main(args) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "cost.png", "results.json", "results.md", "slices.png"
    ]
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "results.json").read_text())
    assert [r for r in printed["rows"] if r["context"] == N] == of(facts, model="moonlight_16b")
    text = (out / "results.md").read_text()
    assert "## Moonlight 16B" in text and "| context | job | v5e | v5p | v6e | tpu7x |" in text
    for context in ("4,096", "2,097,152"):
        for job in ("prefill", "decode", "decode, expanded", "prefill, chosen", "decode, chosen"):
            assert f"| {context} | {job} | " in text


@pytest.mark.parametrize(
    "changes, message",
    [({"models": "kimi_k3"}, "there are kimi_k2"), ({"contexts": "2M"}, "numbers of tokens"),
     ({"contexts": "0"}, "choose 1 to"), ({"out": "/proc/none"}, "cannot be written")],
)
def test_errors_say_what_to_change(changes, message, tmp_path):
    args = {"out": str(tmp_path), "models": "moonlight_16b", "contexts": "4096", "json": False}
    with pytest.raises(UserError, match=message):
        plan_2m.main(argparse.Namespace(**args | changes))
    assert not list(tmp_path.iterdir())


def test_a_slice_that_there_is_not_is_said():
    row = {"fits": False, "bytes_per_chip": 20 * 2**30, "topology": "v5e:16x16", "chunk": None}
    assert plan_page.cell(row) == "none (16x16: 20.0 GiB)"
    assert plan_page.cell(row | {"chunk": 4096}) == "none (16x16 in 4K: 20.0 GiB)"
    assert [plan_page.digits(x) for x in (0.01234, 4.5, 99.96, 21_837)] == [
        "0.0123", "4.50", "100", "21,800"
    ]


def test_the_page_and_the_readme_are_of_these_formulas(facts):
    """If not: python -m experiments.plan_2m --out experiments/plans/plan_2m, and its table."""
    page = (ROOT / "experiments/plans/plan_2m/results.md").read_text().splitlines()
    readme = (ROOT / "README.md").read_text().splitlines()
    for model in MODELS:
        title = facts["models"][model]["title"]
        section = page[page.index(f"## {title}") :]
        fresh = plan_page.table(facts, [(model, N)], plan_2m.KINDS).splitlines()[2:]
        assert [line for line in section if line.startswith(f"| {N:,} |")][:5] == fresh
        shown = [line.replace(f"| {title} |", f"| {N:,} |", 1) for line in readme
                 if line.startswith(f"| {title} |")]
        assert len(shown) == 3 and set(shown) <= set(fresh)


def test_what_the_page_says_of_int4_is_what_its_tables_say():
    page = (ROOT / "experiments/plans/plan_2m/results.md").read_text()
    said = re.search(r"on v6e:8x16 a token takes (\S+) ms against (\S+) ms in bf16", page)
    slow, fast = said.groups()
    for title, time in (("Kimi K2", fast), ("K2-Thinking, int4", slow)):
        section = page[page.index(f"## {title}\n") :]
        row = re.search(rf"^\| {N:,} \| decode \| .*$", section, re.MULTILINE)[0]
        assert row.split(" | ")[4].startswith("8x16: ") and f", {time} ms, " in row.split(" | ")[4]
