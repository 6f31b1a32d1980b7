"""Tokens to the devices of their experts and sums back over the expert axis, none dropped.

E devices hold n tokens each, every token has k choices, e experts lie on a device.

    gather  every token comes to every device, a reduction brings the sums back: E - 1 copies of a
            token each way, over evenly loaded links, and nothing to pack
    ragged  a token goes once to each device that holds a choice of it, and comes back as the sum of
            what its experts say: with even routing (E - 1) (1 - (1 - 1/E)^k) copies each way
    padded  the same rows in an all-to-all that has room for all, where XLA has no ragged one:
            E - 1 copies each way

`choose` takes one of the latter two where E > k: at E = k ragged sends 0.63 of gather's copies, at
E = 8k 0.12; padded sends as many as gather and holds fewer.

Memory: up to E n tokens may ask for one device. gather holds that many. The others go in r = E / k
rounds of m = n / r tokens a device: n k rows packed over all rounds, at most E m = n k arriving and
E m min(k, e) in the products. Gradients compute a round a second time where there are several.
Where rows arrive is fixed: m from each device, in its order. So the way back is the mirror of the
way there, and the gradient of each is the other.
"""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from kimijax.ops.moe import dispatch
from kimijax.parallel.cost import KINDS

AXIS = "expert"  # of a mesh, over which tokens are exchanged
LIMITED = 16  # chips of v5e up to which libtpu 0.0.52 has a ragged all-to-all


class Link(NamedTuple):
    """The mesh axis over which tokens are exchanged."""

    axis: str
    ways: int
    experts: int  # on each device
    ragged: bool  # rows go in a ragged all-to-all, not in one with room for all


def not_ragged(mesh: Mesh | AbstractMesh) -> str | None:
    """Why XLA compiles no ragged all-to-all for the devices of a mesh; None: it does.

    On v5e a program has to use all chips of its slice: the mesh is as large.
    """
    device = mesh.abstract_mesh.abstract_device
    if device is None:  # nothing is known of them, nothing is compiled for them
        return None
    if device.platform == "cpu":
        return "XLA has no ragged all-to-all for CPUs"
    if KINDS.get(device.device_kind) == "v5e" and mesh.size > LIMITED:
        return f"libtpu has no ragged all-to-all for v5e beyond {LIMITED} chips"
    return None


def choose(mesh: Mesh | AbstractMesh, choices: int) -> str:
    """The exchange for tokens of so many choices on the devices of a mesh, as said above."""
    if mesh.shape[AXIS] <= choices:
        return "gather"
    return "padded" if not_ragged(mesh) else "ragged"


@functools.lru_cache(maxsize=256)
def chosen(mesh: Mesh, choices: int) -> str:
    """`choose`, said the first time where devices leave no choice."""
    name = choose(mesh, choices)
    if name == "padded":
        logging.getLogger(__name__).info(
            f"{choices} choices of a token, {AXIS} = {mesh.shape[AXIS]}: padded "
            f"({not_ragged(mesh)})"
        )
    return name


def gather(link: Link, said: Callable, x, ids, weight):
    """Every token to every device: x b t d, ids and weight b t k -> b t d.

    said  (x, ids, weight) -> what the experts of this device add
    """
    everywhere = functools.partial(jax.lax.all_gather, axis_name=link.axis, axis=1, tiled=True)
    y = said(*(everywhere(a) for a in (x, ids, weight)))
    return jax.lax.psum_scatter(y, link.axis, scatter_dimension=1, tiled=True)


def by_device(link: Link, said: Callable, x, ids, weight):
    """The same, every token to the devices of its choices."""
    flat = tuple(a.reshape(-1, a.shape[-1]) for a in (x, ids, weight))
    n, k = flat[1].shape
    rounds = max(1, min(link.ways // k, n))
    if rounds == 1:
        return _round(link, said, *flat).reshape(x.shape)
    m = -(-n // rounds)

    def part(a, fill):
        a = jnp.pad(a, ((0, rounds * m - n), (0, 0)), constant_values=fill)
        return a.reshape(rounds, m, a.shape[-1])

    one = jax.checkpoint(lambda xs: _round(link, said, *xs))
    y = jax.lax.map(one, tuple(map(part, flat, (0, -1, 0))))
    return y.reshape(rounds * m, -1)[:n].reshape(x.shape)


EXCHANGES = {"gather": gather, "ragged": by_device, "padded": by_device}  # by link.ragged


def _round(link: Link, said: Callable, x, ids, weight):
    """Of n tokens: x n d, ids (-1 is none) and weight n k -> n d."""
    n, k = ids.shape
    packed = pack(link, jnp.where(ids >= 0, ids // link.experts, link.ways))
    rows = lambda a: a.at[packed.source].get(mode="fill", fill_value=0)  # noqa: E731
    # Ids are exact in float32; a row that is none arrives as 0, which is no expert's.
    asked = jnp.concatenate([(ids + 1).astype(jnp.float32), weight.astype(jnp.float32)], -1)
    x_here = there(link, n, rows(x), packed.route)
    asked, x_here = in_turn(rows(asked), x_here)
    asked = there(link, n, asked, packed.route)
    ids_here, weight_here = asked[:, :k].astype(jnp.int32) - 1, asked[:, k:].astype(weight.dtype)
    ids_here, weight_here = _own(link, ids_here, weight_here)
    y = said(x_here[None], ids_here[None], weight_here[None])[0]
    y = back(link, n, packed.source.shape[0], y, packed.route)
    chosen = y.at[packed.slot].get(mode="fill", fill_value=0)
    return chosen.sum(1, dtype=jnp.float32).astype(x.dtype)


def _own(link: Link, ids, weight):
    """The choices that are here: of a token no more than there are experts."""
    most = min(ids.shape[-1], link.experts)
    mine = (ids >= 0) & (ids // link.experts == jax.lax.axis_index(link.axis))
    first = jnp.argsort(~mine, axis=-1, stable=True)[:, :most]
    mine, ids, weight = (jnp.take_along_axis(a, first, -1) for a in (mine, ids, weight))
    return jnp.where(mine, ids, -1), weight


class Route(NamedTuple):
    """Rows by device: where those for it start and how many there are, and those for us on it."""

    starts: jax.Array  # e
    sizes: jax.Array  # e
    their_starts: jax.Array  # e
    their_sizes: jax.Array  # e


class Packed(NamedTuple):
    """Tokens n by the device that they go to, behind one another."""

    slot: jax.Array  # n k   the row that a choice is on, behind the end where it is on another's
    source: jax.Array  # rows   the token of each row, n where there is none
    route: Route


def pack(link: Link, device: jax.Array) -> Packed:
    """Plan the exchange of tokens that ask devices n k; `ways` is nobody."""
    n, k = device.shape
    same = device[:, :, None] == device[:, None, :]
    earlier = jnp.tril(jnp.ones((k, k), bool), -1)
    device = jnp.where((same & earlier).any(-1), link.ways, device)  # once to each device
    plan = dispatch(device, link.ways, 1)
    sizes = jnp.zeros(link.ways, jnp.int32).at[device].add(1, mode="drop")
    starts = jnp.cumsum(sizes) - sizes
    theirs = jax.lax.all_to_all(jnp.stack([starts, sizes], 1), link.axis, 0, 0, tiled=True)
    starts, sizes, theirs = in_turn(starts, sizes, theirs)
    return Packed(plan.slot, plan.source, Route(starts, sizes, theirs[:, 0], theirs[:, 1]))


def in_turn(*arrays):
    """The same, so that a collective of one follows those of the others.

    XLA aborts on CPU where independent collectives of a program run at once.
    """
    return jax.lax.optimization_barrier(arrays)


def there(link: Link, n: int, x: jax.Array, route: Route) -> jax.Array:
    """Packed rows to their devices: rows ... -> E*n ..., zeros where nothing arrives."""
    return _both_ways(link, n, x.shape[0])[0](x, route)


def back(link: Link, n: int, rows: int, y: jax.Array, route: Route) -> jax.Array:
    """The mirror of `there`: E*n ... -> rows ..."""
    return _both_ways(link, n, rows)[1](y, route)


@functools.cache
def _both_ways(link: Link, n: int, rows: int) -> tuple[Callable, Callable]:
    def go(x, r: Route):
        me = jax.lax.axis_index(link.axis)
        out = jnp.zeros((link.ways * n, *x.shape[1:]), x.dtype)
        places = jnp.full(link.ways, me * n, jnp.int32)
        return _send(link, n, x, out, r.starts, r.sizes, places, r.their_sizes)

    def come(y, r: Route):
        out = jnp.zeros((rows, *y.shape[1:]), y.dtype)
        places = jnp.arange(link.ways, dtype=jnp.int32) * n
        return _send(link, n, y, out, places, r.their_sizes, r.their_starts, r.sizes)

    return _mirrored(go, come), _mirrored(come, go)


def _mirrored(f: Callable, mirror: Callable) -> Callable:
    """f with the gradient that its mirror brings."""
    call = jax.custom_vjp(f)
    call.defvjp(lambda x, r: (f(x, r), r), lambda r, d: (mirror(d, r), None))
    return call


def _send(link: Link, most: int, x, out, starts, sizes, places, coming):
    """jax.lax.ragged_all_to_all, of runs of `most` rows at most."""
    if link.ragged:
        return jax.lax.ragged_all_to_all(
            x, out, starts, sizes, places, coming, axis_name=link.axis
        )
    each = jnp.arange(most)
    runs = x.at[starts[:, None] + each].get(mode="fill", fill_value=0)
    runs = jax.lax.all_to_all(runs, link.axis, 0, 0, tiled=True)
    places, runs = in_turn(places, runs)
    places = jax.lax.all_to_all(places, link.axis, 0, 0, tiled=True)
    at = jnp.where(each < coming[:, None], places[:, None] + each, out.shape[0])
    return out.at[at].set(runs, mode="drop")
