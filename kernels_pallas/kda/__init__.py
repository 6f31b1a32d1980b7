"""The gated delta rule with a decay per channel (Kimi Delta Attention, arXiv:2510.26692).

A head keeps a matrix S from keys to values. A token first lets every key channel decay, then
corrects what S answers to its key towards its value, then reads S with its query:

    S <- diag(exp g) S,    u = beta (v - S^T k),    S <- S + k u^T,    o = S^T q

Everything is float32: the state sums over the whole past. Tokens are in order; documents of a row
are told apart by where they start. A token with g = 0 and beta = 0 leaves the state unchanged
(padding).
"""

import functools

import jax

from kernels_pallas import limits
from kernels_pallas.kda import ref, tpu, xla

# b batch, t token, h head, k key dim, v value dim
IMPLS = {
    "ref": ref.kda,
    "xla": xla.kda,
    "pallas": tpu.kda,
    "pallas_interpret": functools.partial(tpu.kda, interpret=True),
}


def kda(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    start: jax.Array,
    *,
    impl: str,
) -> tuple[jax.Array, jax.Array]:
    """Run the rule over t tokens: (out b t h v, state b h k v after the last token), float32.

    q, k    b t h k   k of unit length (or shorter), q normalised and scaled by the caller
    v       b t h v
    g       b t h k   float32 log decay, <= 0
    beta    b t h     float32, how much of the error is corrected: 0 to 1
    state   b h k v   float32, before the first token
    start   b t       bool, the token begins another document: the state is zero before it

    `impl`: "ref", "xla", "pallas" (a TPU) or "pallas_interpret" (the same kernels, interpreted on
    any device). Differentiable in all float inputs. ValueError for an unknown impl or shapes that
    do not fit.
    """
    if impl not in IMPLS:
        raise ValueError(f"kda: unknown {impl=}, there are {sorted(IMPLS)}")
    if q.ndim != 4 or v.ndim != 4:
        raise ValueError(f"kda: q must be b t h k and v b t h v, they are {q.shape} and {v.shape}")
    (b, t, h, key), value = q.shape, v.shape[-1]
    wanted = {
        "k": (k, (b, t, h, key)),
        "v": (v, (b, t, h, value)),
        "g": (g, (b, t, h, key)),
        "beta": (beta, (b, t, h)),
        "state": (state, (b, h, key, value)),
        "start": (start, (b, t)),
    }
    for name, (x, shape) in wanted.items():
        if x.shape != shape:
            raise ValueError(
                f"kda: {name} is {x.shape}; with q b t h k {q.shape} and {value} values a head it "
                f"must be {shape}"
            )
    limits.check("kda", impl, tpu.unsupported, q, k, v)
    return IMPLS[impl](q, k, v, g, beta, state, start)
