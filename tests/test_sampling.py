"""Filters equal a plain numpy reference; draws depend on seed, row and step alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimijax.errors import UserError
from kimijax.sampling import (
    Knobs,
    Sampling,
    Stops,
    StopStream,
    _kept,
    cut_at_stop,
    knobs,
    row_keys,
    sample,
)

draw = jax.jit(sample)
VOCAB = 40


def kept_in_numpy(logits, s, seen=None):
    """Ids that the filters leave of logits v, by the words of transformers, one id at a time."""
    logits = logits.astype(np.float64)
    if seen is not None:
        scaled = np.where(logits > 0, logits / s.repetition_penalty, logits * s.repetition_penalty)
        logits = np.where(seen, scaled, logits)
    logits = logits / s.temperature
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    order = order[: s.top_k] if s.top_k else order
    probs = np.exp(logits[order] - logits.max())
    probs /= probs.sum()
    if s.top_p < 1:
        count = next((n for n in range(1, len(order)) if probs[:n].sum() >= s.top_p), len(order))
        order = order[:count]
    return {i for i, p in zip(order, probs, strict=False) if p >= s.min_p * probs[0]}


def keys_of(rows, seed=0, step=0):
    return row_keys(np.uint32(seed), np.arange(rows), np.int32(step))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(top_k=1),
        Sampling(top_k=5),
        Sampling(top_k=100),
        Sampling(top_p=0.5),
        Sampling(top_p=1e-6),
        Sampling(min_p=0.2),
        Sampling(min_p=1.0),
        Sampling(temperature=0.3, top_p=0.7),
        Sampling(repetition_penalty=1.7, top_k=6),
        Sampling(temperature=2.5, top_k=20, top_p=0.8, min_p=0.1, repetition_penalty=0.6),
    ],
    ids=str,
)
def test_filters_leave_what_numpy_leaves(rng, sampling):
    """1,024 draws: every token that is left and likely comes, none that is not left."""
    logits = rng.normal(size=VOCAB).astype(np.float32) * 2
    logits[7] = logits[9]  # a tie
    seen = rng.random(VOCAB) < 0.3
    want = kept_in_numpy(logits, sampling, seen)
    rows = 1024
    got = draw(*(np.broadcast_to(x, (rows, VOCAB)) for x in (logits, seen)),
               knobs([sampling] * rows), keys_of(rows))
    got = set(np.asarray(got).tolist())
    assert got <= want
    if len(want) <= 5:
        assert got == want


def test_ties_are_cut_by_id():
    ranked = jnp.zeros((1, 6))
    k = Knobs(*(x[:, None] for x in knobs([Sampling(top_k=2)])))
    assert _kept(ranked, k).tolist() == [[True, True, False, False, False, False]]
    k = Knobs(*(x[:, None] for x in knobs([Sampling(top_p=0.4)])))
    assert _kept(ranked, k).tolist() == [[True, True, True, False, False, False]]


def test_temperature_zero_is_argmax_and_rows_have_their_own_settings(rng):
    logits = rng.normal(size=(3, VOCAB)).astype(np.float32)
    greedy = Sampling(temperature=0, top_k=3)
    rows = [greedy, Sampling(temperature=1e-6), Sampling(top_k=1, temperature=1e6)]
    for settings in (rows, [greedy] * 3):
        got = draw(logits, None, knobs(settings), keys_of(3))
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, logits.argmax(-1))


def test_the_penalty_counts_for_the_likeliest_too():
    logits = np.array([[2.0, 1.5, -1.0], [-3.0, -1.0, -1.2]], np.float32)
    seen = np.array([[True, False, False], [False, True, False]])
    settings = knobs([Sampling(temperature=0, repetition_penalty=2.0)] * 2)
    assert draw(logits, seen, settings, keys_of(2)).tolist() == [1, 2]


def test_draws_follow_the_distribution():
    rows, temperature = 1 << 14, 1.5
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1, 1e-30], np.float32))
    want = np.exp(logits / temperature)
    want /= want.sum()
    settings = knobs([Sampling(temperature=temperature)] * rows)
    got = draw(np.broadcast_to(logits, (rows, 5)), None, settings, keys_of(rows, seed=3))
    counts = np.bincount(got, minlength=5) / rows
    np.testing.assert_allclose(counts, want, atol=4 * 0.5 / rows**0.5)  # four standard errors


def test_a_row_depends_on_its_seed_and_step_alone(rng):
    logits = rng.normal(size=(4, VOCAB)).astype(np.float32)
    settings = knobs([Sampling()] * 4)
    whole = np.asarray(draw(logits, None, settings, keys_of(4, 5, 2)))
    np.testing.assert_array_equal(whole, draw(logits, None, settings, keys_of(4, 5, 2)))
    other = logits[[3, 2, 1, 0]]
    other[0] += rng.normal(size=VOCAB)
    back = draw(other, None, settings, row_keys(np.uint32(5), np.array([3, 2, 1, 0]), 2))
    np.testing.assert_array_equal(np.asarray(back)[1:], whole[[2, 1, 0]])
    keys = {
        jax.random.key_data(key).tobytes()
        for seed in (0, 1, 2**32 - 1) for step in (0, 1) for key in keys_of(3, seed, step)
    }
    assert len(keys) == 18
    want = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 1), 4)
    assert (jax.random.key_data(keys_of(2, 7, 4)[1]) == jax.random.key_data(want)).all()


def test_one_setting_can_be_static(rng):
    logits = rng.normal(size=(4, VOCAB)).astype(np.float32)
    sampling = Sampling(temperature=0.7, top_p=0.9)
    static = jax.jit(functools.partial(sample, sampling=sampling))
    want = draw(logits, None, knobs([sampling] * 4), keys_of(4))
    np.testing.assert_array_equal(static(logits, None, keys=keys_of(4)), want)


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -1), ("temperature", float("nan")), ("temperature", 1e-9),
        ("temperature", "0.5"), ("temperature", True), ("temperature", 10**400),
        ("top_k", -1), ("top_k", 1.0), ("top_k", 2**31), ("top_p", 0), ("top_p", 1.1),
        ("min_p", -0.1), ("min_p", float("inf")), ("repetition_penalty", 0), ("seed", -1),
        ("seed", 2**32), ("seed", None),
    ],
)
def test_settings_that_mean_nothing_are_refused(field, value):
    with pytest.raises(UserError, match=f"^{field} .* must be"):
        Sampling(**{field: value})


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="must be b v, and keys"):
        sample(jnp.zeros((2, 5)), None, Sampling(), keys_of(3))


@pytest.mark.parametrize(
    "text, stops, want",
    [
        ("abc", [], ("abc", False)),
        ("abcd", ["bcd", "c"], ("ab", True)),  # c is complete first
        ("abcd", ["cd", "bcd"], ("a", True)),  # both end together
        ("", ["a"], ("", False)),
        ("aaab", ["aab"], ("a", True)),
        ("a\n\nUser: b", ["\nUser:", "\n\nUser:"], ("a", True)),
        ("héé<|im", ["<|im_end|>"], ("héé<|im", False)),
    ],
)
def test_stops_cut_streams_as_they_cut_the_whole(text, stops, want):
    assert cut_at_stop(text, stops) == want
    for size in (1, 2, 3, 100):
        stream = StopStream(stops)
        shown = "".join(stream.push(text[i : i + size]) for i in range(0, len(text), size))
        assert want[0].startswith(shown)
        assert (shown + stream.finish(), stream.stopped) == want


def test_what_cannot_begin_a_stop_is_shown_at_once():
    stream = StopStream(["END", "\n\n"])
    assert [stream.push(x) for x in ("abE", "N", "x\n", "y", "EN", "D more", "z")] == [
        "ab", "", "ENx", "\ny", "", "", "",
    ]
    assert stream.stopped and stream.finish() == ""
    with pytest.raises(UserError, match="must be text of at least one character"):
        Stops(strings=("",))
