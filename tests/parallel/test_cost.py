"""The costs of the strategies: limits that must hold, bytes counted one by one."""

import itertools
import logging

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.attention import Queries
from kimijax.errors import UserError
from kimijax.ops.attend import Latents
from kimijax.parallel.cost import DEVICES, Rates, Work, choose, explain, rates_of, seconds, sent
from kimijax.parallel.mesh import make_mesh
from kimijax.parallel.plan import Plan
from tests.conftest import array

K2 = Work(tokens=65_536, ways=8, heads=64, key=128, rope=64, value=128, latent=512)


def _sends(work: Work, strategy: str) -> int:
    """Bytes device 0 sends, every array and every receiver added up."""
    name, _, size = strategy.partition(":")
    group = {"ring": 1, "gather": 1, "ulysses": work.ways}.get(name) or int(size)
    own, share, total = work.tokens // work.ways, work.heads // group, 0
    latent = (work.latent + work.rope) * work.bytes + 2 * 4
    for _ in range(1, group):
        total += own * latent
        total += own * 3 * 4  # pos, seg, since of the queries
        total += own * share * (work.key + work.rope) * work.bytes
        total += own * share * (work.value + 1 + 1) * 4  # out, lse, max_logit
    for _ in range(1, work.ways // group):
        total += group * own * latent
    return total


@pytest.mark.parametrize("ways, heads, size", [*itertools.product((1, 2, 8), (8, 64), (2, 4))])
def test_bytes_are_those_counted_one_by_one(ways, heads, size):
    work = K2._replace(ways=ways, heads=heads, bytes=size)
    names = ["ring", "gather", "ulysses", *(f"hybrid:{g}" for g in (2, 4) if g < ways)]
    assert sent(work) == {name: _sends(work, name) for name in names}


@pytest.mark.parametrize("rates", DEVICES.values(), ids=DEVICES)
def test_one_device_costs_the_same_in_every_way(rates):
    cost = seconds(K2._replace(ways=1), rates)
    assert cost["ring"] == pytest.approx(cost["gather"]) == pytest.approx(cost["ulysses"])
    assert choose(K2._replace(ways=1), rates)[0] == "ring"


@pytest.mark.parametrize("rates", DEVICES.values(), ids=DEVICES)
def test_a_long_row_hides_the_sends_of_the_ring_and_a_short_one_does_not(rates):
    still = rates._replace(link=float("inf"))
    long, short = K2._replace(tokens=1 << 24, ways=64), K2._replace(tokens=64, heads=1)
    assert seconds(long, rates)["ring"] == pytest.approx(seconds(long, still)["ring"])
    assert seconds(long, rates)["gather"] > seconds(long, still)["gather"]
    assert choose(long, rates)[0] != "gather"
    slow = rates._replace(link=1e-3 * rates.link)
    assert seconds(short, slow)["ring"] > 1.5 * seconds(short, still)["ring"]


def test_few_heads_rule_sharing_them_out():
    shared = {1: [], 4: ["hybrid:2", "hybrid:4"], 12: ["hybrid:2", "hybrid:4"]}
    for heads, names in shared.items():
        _, cost = choose(K2._replace(heads=heads), DEVICES["v5p"])
        assert set(cost) == {"ring", "gather", *names}
    assert choose(K2._replace(heads=1), DEVICES["v5p"])[0] == "ring"


@pytest.mark.parametrize("rates", DEVICES.values(), ids=DEVICES)
def test_more_devices_than_heads_form_groups(rates):
    """A ring projects every latent to all heads on every device, a group of 64 to one head each."""
    strategy, cost = choose(K2._replace(tokens=1 << 21, ways=512), rates)
    assert strategy.startswith("hybrid:") and cost[strategy] < cost["ring"]


@pytest.mark.parametrize("heads, latent", [(8, 512), (64, 512), (64, 16)])
def test_slow_links_favour_the_fewest_bytes(heads, latent):
    work = K2._replace(heads=heads, latent=latent)
    fewest = min(_sends(work, name) for name in sent(work))
    strategy, _ = choose(work, Rates(1e15, 1.0))
    assert _sends(work, strategy) == fewest


def test_fast_links_favour_heads_dealt_out_which_project_less():
    assert choose(K2, Rates(1e12, 1e15))[0] == "ulysses"


def test_an_uneven_order_slows_all_but_ulysses():
    even, uneven = (seconds(K2._replace(balance=b), DEVICES["v5p"]) for b in (1.0, 1.875))
    assert uneven["ring"] > even["ring"] and uneven["gather"] > even["gather"]
    assert uneven["ulysses"] == even["ulysses"]
    free = Rates(1.0, float("inf"))  # no sends, nothing to project: attention alone
    even, uneven = (seconds(K2._replace(balance=b, latent=0), free) for b in (1.0, 1.875))
    of_two_devices = 1.5  # a contiguous row on two: 2 - 1/2
    assert uneven["hybrid:4"] / even["hybrid:4"] == pytest.approx(of_two_devices)


def test_explanation_is_one_line_with_every_estimate():
    line = explain(K2, *choose(K2, DEVICES["v5e"]))
    assert "\n" not in line and all(name in line for name in ("65536", "ring", "gather", "ulysses"))


def test_a_device_that_is_not_in_the_table_is_named():
    assert rates_of("TPU v5 lite") == DEVICES["v5e"]
    with pytest.raises(UserError, match="NVIDIA H100.*name a strategy"):
        rates_of("NVIDIA H100")


@pytest.mark.parametrize("ways, chosen", [(1, "ring"), (8, "hybrid:2")])
def test_a_plan_chooses_and_says_so_once(ways, chosen, caplog, rng):
    """Two heads, eight devices: pairs share them."""
    shape = lambda *s: array(rng.normal(size=s))  # noqa: E731
    pos = jnp.arange(16, dtype=jnp.int32)[None]
    same = jnp.zeros_like(pos)
    q = Queries(shape(1, 16, 2, 64), shape(1, 16, 2, 4), pos, same, same)
    kv = Latents(shape(1, 16, 512), shape(1, 16, 4), pos, same)
    up = shape(512, 2, 64), shape(512, 2, 64)
    got = Plan(make_mesh({"seq": ways}), strategy="auto").ops().attend
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            jax.eval_shape(lambda *args: got(*args, scale=1.0), q, kv, up)
    said = [r.getMessage() for r in caplog.records]
    assert sum(f"16 tokens, {ways} ways: {chosen} " in line for line in said) == 1
