"""Where a model runs: all that its maths does not need to know.

    plan = Plan(make_mesh({"seq": 8}), order="zigzag")
    model = Model(cfg, plan.ops())
    params = jax.device_put(params, plan.shardings(cfg))
    call, order = plan.arrange(cfg, ids)           # padded, permuted
    runs = call.pop("runs")
    hidden = order.restore(model.apply(params, **call, runs=runs).hidden)
"""

import functools
import logging
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.attention import Keys
from kernels_pallas.kda import kda
from kimijax.cache import FAR, LARGE, Cache, lead_slots, run_length
from kimijax.config import ModelConfig
from kimijax.errors import UserError
from kimijax.model import Model, abstract_params
from kimijax.ops.attend import EXPERTS, Ops, experts_by, known_impl, local, tiled
from kimijax.ops.delta import delta_runs
from kimijax.parallel import blocks, compiler, experts, rules
from kimijax.parallel.attend import STRATEGIES, check, known, sharded
from kimijax.parallel.axes import Axes
from kimijax.parallel.collect import collect
from kimijax.parallel.cost import Work, choose, explain, rates_of
from kimijax.parallel.exchange import EXCHANGES, not_ragged
from kimijax.parallel.order import ORDERS, Order, make_order
from kimijax.parallel.sources import HEADS, LATENTS
from kimijax.parallel.store import dealt_rows, recall


@dataclass(frozen=True)
class Plan:
    """A mesh, the table of weights, and how a sequence lies and meets itself on it."""

    mesh: Mesh
    order: str = "contiguous"  # of the tokens of a row: or zigzag, striped
    strategy: str = "ring"  # of attention without a cache: or gather, ulysses, hybrid, hybrid:N,
    # ring_dma (attend.py), auto (cost.py)
    train: bool = False  # weights are dealt over data and seq as well
    impl: str | None = None  # of the ops; None: pallas on a TPU, xla elsewhere
    experts: str | None = None  # tiled or grouped; None: what is fast on the mesh's devices
    # Of tokens for experts: gather, ragged or padded; None: the cheapest that the devices have.
    exchange: str | None = None
    exact: bool = False
    remat: bool = False  # gradients compute layers, but attention, a second time from their inputs

    def __post_init__(self):
        for what, names, good in (
            ("order", ORDERS, self.order in ORDERS),
            ("strategy", (*STRATEGIES, "auto"), self.strategy == "auto" or known(self.strategy)),
            ("experts", EXPERTS, self.experts in (None, *EXPERTS)),
            ("exchange", EXCHANGES, self.exchange in (None, *EXCHANGES)),
        ):
            if not good:
                value = getattr(self, what)
                raise UserError(f"{what} {value!r:.40}: there are {', '.join(names)}")
        if self.exchange == "ragged" and (why := not_ragged(self.mesh)):
            raise UserError(f"exchange ragged: {why}; name padded, or leave it out")

    @property
    def axes(self) -> Axes:
        """What lies on which mesh axes."""
        return Axes(self.mesh)

    @property
    def ways(self) -> int:
        """Devices over which the tokens of a row, or the slots of its cache, lie."""
        return self.axes.ways

    def ops(self) -> Ops:
        """The operations to hand to a model. The same plan gives the same object."""
        return _ops(self)

    def shardings(self, cfg: ModelConfig):
        """Of every parameter, as a tree like the parameters."""
        boxed = abstract_params(Model(cfg, local()))
        return rules.shardings(boxed, self.mesh, rules.TRAIN if self.train else rules.SERVE)

    def placements(self, cfg: ModelConfig) -> dict[str, NamedSharding]:
        """`shardings` by the names of parameters joined by ".": what loading takes."""
        return flatten_dict(self.shardings(cfg)["params"], sep=".")

    def cache_shardings(self, cache: Cache):
        """Of a cache (or its shapes) with `ways` of this plan: large states dealt by slot."""

        def one(path, leaf):
            name = getattr(path[-1], "key", None)
            rows, _ = self.axes.place((leaf.shape[1] if name else leaf.shape[0], 1))
            dealt = self.axes.tokens if name in LARGE else None
            return NamedSharding(self.mesh, P(None, rows, dealt) if name else P(rows))

        return jax.tree_util.tree_map_with_path(one, cache)

    def arrange(
        self, cfg: ModelConfig, ids: np.ndarray, pos: np.ndarray | None = None,
        seg: np.ndarray | None = None,
    ) -> tuple[dict, "Arranged"]:
        """Arguments of Model.__call__ for rows b t without a cache, padded and in this order.

        Returns them and what brings arrays b t' ... of the model back to the order given.
        """
        b, t = ids.shape
        rows = self.mesh.shape["data"]
        if b % rows:
            raise UserError(f"{b} rows are no multiple of the mesh axis data = {rows}; add rows")
        arranged = self.layout(cfg, t)
        pos = np.broadcast_to(np.arange(t, dtype=np.int32), (b, t)) if pos is None else pos
        seg = np.zeros((b, t), np.int32) if seg is None else seg
        moved = {
            name: arranged.apply(x, fill)
            for name, x, fill in (("ids", ids, 0), ("pos", pos, FAR), ("seg", seg, -1))
        }
        return {**moved, "runs": arranged.order.runs}, arranged

    def layout(self, cfg: ModelConfig, tokens: int) -> "Arranged":
        """How rows of so many tokens lie: padded and permuted."""
        order = make_order(self.order, tokens, self.ways, run_length(cfg), lead_slots(cfg))
        return Arranged(order, tokens)


@dataclass(frozen=True)
class Arranged:
    """How rows were arranged."""

    order: Order
    tokens: int

    def apply(self, x: np.ndarray, fill: float) -> np.ndarray:
        """b t ... in the order given -> b t' ... as the rows were arranged, padded with `fill`."""
        pad = ((0, 0), (0, self.order.length - self.tokens), *((0, 0),) * (x.ndim - 2))
        return np.pad(x, pad, constant_values=fill)[:, self.order.places]

    def restore(self, x: jax.Array) -> jax.Array:
        """b t' ... of the arranged rows -> b t ... in the order given, padding left out."""
        back = np.argsort(self.order.places)[: self.tokens]
        return jnp.take(x, back, axis=1)


@functools.lru_cache(maxsize=32)
def _ops(plan: Plan) -> Ops:
    axes, on_tpu = plan.axes, plan.mesh.devices.flat[0].platform == "tpu"
    impl = known_impl(plan.impl or ("pallas" if on_tpu else "xla"))
    if plan.strategy == "ring_dma" and plan.remat and impl == "pallas_interpret":
        raise UserError(
            "strategy ring_dma and remat: jax computes no simulated TPU a second time; leave remat "
            "out, or name strategy ring"
        )
    compute = experts_by(plan.experts, impl)

    def attend(q, kv, up, *, scale):
        strategy = plan.strategy
        if strategy == "auto":
            if isinstance(kv, Keys):
                raise UserError("strategy auto counts latents, these layers send keys: name one")
            strategy = _cheapest(plan, _work(plan, q, kv, up))
        check(axes, strategy, q.nope.shape[2], q.nope.shape[1])
        source = HEADS if isinstance(kv, Keys) else LATENTS
        return sharded(axes, strategy, source, impl, scale)(q, kv, up)

    def spread(x):
        where = NamedSharding(plan.mesh, P(*axes.place(x.shape[:2])))
        return jax.lax.with_sharding_constraint(x, where)

    def collected(cfg, group, layer, params, dtype):
        places = jax.tree.map(  # of one repeat, not of their stack
            lambda at: NamedSharding(at.mesh, P(*at.spec[1:])),
            plan.shardings(cfg)["params"][group][layer],
        )
        return collect(places, params, dtype)

    def runs(t, run, least):
        length = t // plan.ways
        return plan.ways if t % plan.ways == 0 and length % run == 0 and length >= least else 1

    return Ops(
        attend=attend,
        recall=partial(recall, axes, impl),
        tiled=lambda *args, scale: _apart(axes, partial(tiled, scale=scale))(*args),
        select=partial(blocks.select, axes, impl),
        top_blocks=partial(blocks.top_blocks, axes, impl),
        delta=_apart(axes, partial(delta_runs, impl=impl)),
        kda=_apart(axes, partial(kda, impl=impl), dealt=False),
        experts=partial(
            experts.experts, axes, compute, plan.exchange, rules.DEALT if plan.train else ()
        ),
        rows=dealt_rows(axes),
        exact=plan.exact,
        remat=plan.remat,
        collect=collected if plan.train else None,
        spread=spread,
        deal=lambda x: jax.lax.with_sharding_constraint(x, plan.cache_shardings(x)),
        whole=lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(plan.mesh, P())),
        runs=runs,
        ways=plan.ways,
        batch=plan.mesh.shape["data"],
        compiler=compiler.serving(plan.mesh),
    )


def _work(plan: Plan, q, kv, up) -> Work:
    """Of one row of a call; the tokens of a contiguous one have from 1 to S keys in sight."""
    _, tokens, heads, key = q.nope.shape
    return Work(
        tokens, plan.ways, heads // plan.mesh.shape["tensor"], key,
        0 if q.rope is None else q.rope.shape[-1], up[1].shape[-1], kv.latent.shape[-1],
        kv.latent.dtype.itemsize, 2 - 1 / plan.ways if plan.order == "contiguous" else 1.0,
    )


@functools.lru_cache(maxsize=256)
def _cheapest(plan: Plan, work: Work) -> str:
    """The strategy for a call; said the first time."""
    strategy, cost = choose(work, rates_of(plan.mesh.devices.flat[0].device_kind))
    logging.getLogger(__name__).info(explain(work, strategy, cost))
    return strategy


def _apart(axes: Axes, f, dealt: bool = True):
    """f over arrays b r ..., of which every device computes its own rows and runs.

    dealt  the second dim is dealt too; if not, only rows are
    """

    def call(*args):
        rows, runs = axes.place(jax.tree.leaves(args)[0].shape[:2])
        spec = P(rows, runs) if dealt else P(rows)
        return jax.shard_map(
            f, mesh=axes.mesh, in_specs=spec, out_specs=spec, check_vma=False
        )(*args)

    return call
