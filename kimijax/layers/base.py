"""The pieces every layer is made of: a projection, a norm, a short convolution."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from kimijax.cache import Tokens
from kimijax.config import FP8_BLOCK, Fp8Config
from kimijax.ops.fp8 import expand
from kimijax.ops.norm import rms
from kimijax.ops.runs import shifts


def weight(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    init: Callable,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """A parameter whose dims are named."""
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, dtype)


def fan_in(inputs: int) -> Callable:
    """Normal with standard deviation inputs^-1/2."""
    return nn.initializers.normal(inputs**-0.5)


def matrix(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    init: Callable,
    form: Fp8Config | None,
    inputs: int = 1,
) -> jax.Array:
    """A weight inputs... outputs... as floats, from parameters of the form that a config names.

    inputs  leading dims that are contracted
    """
    if form is None:
        return weight(module, name, shape, axes, init)
    empty, outputs = nn.initializers.zeros, shape[inputs:]
    codes = weight(module, f"{name}_codes", shape, axes, empty, jnp.uint8)
    blocks = -(-math.prod(shape[:inputs]) // FP8_BLOCK)
    axes = ("input_block", *axes[inputs:])
    return expand(codes, weight(module, f"{name}_scale", (blocks, *outputs), axes, empty))


class Proj(nn.Module):
    """A weight and its einsum: the one place where weights are cast to the activation's dtype."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    inputs: int = 1  # leading dims that are contracted
    init: Callable | None = None
    form: Fp8Config | None = None  # of the parameters

    @nn.compact
    def __call__(self, eqn: str, x: jax.Array) -> jax.Array:
        init = self.init or fan_in(math.prod(self.shape[: self.inputs]))
        w = matrix(self, "w", self.shape, self.axes, init, self.form, self.inputs)
        return jnp.einsum(eqn, x, w.astype(x.dtype))


class RMSNorm(nn.Module):
    """w * x / rms(x): statistics in float32, cast before the multiplication by w."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        w = weight(self, "w", x.shape[-1:], ("norm",), nn.initializers.ones)
        return rms(x, self.eps) * w.astype(x.dtype)


class Conv(nn.Module):
    """x plus a depthwise causal convolution of it."""

    taps: int

    @nn.compact
    def __call__(self, x, past, tokens: Tokens):
        """x b t d, past b taps-1 d or None -> (y, new past)."""
        shape = (self.taps, x.shape[-1])
        w = weight(self, "w", shape, ("tap", "embed"), nn.initializers.normal(0.3))
        earlier, past = shifts(x, past, tokens, self.taps - 1)
        taps = [x, *earlier]
        return x + sum(tap * w[j].astype(x.dtype) for j, tap in enumerate(taps)), past
