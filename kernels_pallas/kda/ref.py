"""The definition of the gated delta rule: one token after the other, float32."""

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def kda(q, k, v, g, beta, state, start):
    """The four lines of the package docstring, scanned over tokens."""
    f32 = jnp.float32

    def token(s, xs):
        q, k, v, g, beta, start = xs  # b h k, b h k, b h v, b h k, b h, b
        s = jnp.where(start[:, None, None, None], 0.0, s) * jnp.exp(g)[..., None]
        u = beta[..., None] * (v - jnp.einsum("bhkv,bhk->bhv", s, k, precision=HIGHEST))
        s = s + k[..., None] * u[..., None, :]
        return s, jnp.einsum("bhkv,bhk->bhv", s, q, precision=HIGHEST)

    xs = (*(x.astype(f32) for x in (q, k, v, g, beta)), start)
    state, out = jax.lax.scan(
        token, state.astype(f32), tuple(jnp.moveaxis(x, 1, 0) for x in xs)
    )
    return jnp.moveaxis(out, 0, 1), state
