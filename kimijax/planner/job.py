"""What is to be planned: a job of a model, and how it lies on a mesh of chips."""

import functools
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kimijax.cache import Cache, check_latents, empty_cache, lead_slots, run_length
from kimijax.config import CompressedConfig, Fp8Config, Int4Config, ModelConfig, MoEConfig
from kimijax.config_tree import expanded, override
from kimijax.convert.source import leaf_dtype
from kimijax.errors import UserError
from kimijax.model import Model, abstract_params
from kimijax.ops.attend import local
from kimijax.ops.rope import MAX_POSITION
from kimijax.parallel import rules
from kimijax.parallel.mesh import AXES
from kimijax.parallel.order import Order, make_order
from kimijax.parallel.plan import Plan

RATE = 2e-4  # of learning: no size depends on it


@dataclass(frozen=True)
class Job:
    """prefill: rows are read, whole or in chunks. decode: a token behind a cache. train: a step."""

    cfg: ModelConfig  # its weights in the form in which they are held
    kind: str
    context: int  # tokens of a row, or slots of its cache
    batch: int = 1
    dtype: str = "bfloat16"  # of activations, caches and, but in training, of float weights
    chunk: int | None = None  # tokens of a row in a call of prefill, behind a cache; None: all
    latents: str | None = None  # how a cache keeps them, as of kimijax.cache.empty_cache

    def __post_init__(self):
        if not 1 <= self.context <= MAX_POSITION:
            raise UserError(
                f"--context {self.context}: positions are int32 and rotary tables reach "
                f"{MAX_POSITION}; choose 1 to {MAX_POSITION}"
            )
        if self.batch < 1:
            raise UserError(f"--batch {self.batch}: at least one row is needed")
        if self.chunk is not None:
            if self.kind != "prefill":
                raise UserError(f"--chunk is of --job prefill, not of {self.kind}; leave it out")
            if not 1 <= self.chunk <= self.context:
                raise UserError(f"--chunk {self.chunk}: choose 1 to {self.context}, the context")
            if any(isinstance(layer.mixer, CompressedConfig) for layer in self.cfg.layers):
                raise UserError("--chunk: chunks of compressed attention are not planned; leave it "
                                "out, or plan a model of other layers")
        if self.latents is not None:
            check_latents(self.cfg, self.latents)
            if not self.cached:
                raise UserError(f"--cache {self.latents}: this job has none; leave it out, or plan "
                                "--job decode, or prefill with --chunk")
        if self.kind == "train" and self.cfg != expanded(self.cfg):
            raise UserError("train: quantised weights have no gradients; leave --weights at bf16")

    @property
    def order(self) -> str:
        """Of a row's tokens: even work for every device where rows are read whole."""
        return "contiguous" if self.cached else "zigzag"

    @property
    def cached(self) -> bool:
        """Whether its calls stand behind a cache of `context` slots."""
        return self.kind == "decode" or self.chunk is not None

    @property
    def calls(self) -> int:
        """In which a row is read; 1 elsewhere."""
        return 1 if self.chunk is None else -(-self.context // self.chunk)

    @property
    def tokens(self) -> int:
        """New ones of a step, or of all calls, all rows."""
        return self.batch * (1 if self.kind == "decode" else self.context)


def held(cfg: ModelConfig, weights: str) -> ModelConfig:
    """The config with weights as floats ("bf16"), as FP8 releases or as K2-Thinking hold them."""
    cfg = expanded(cfg)
    if weights == "bf16":
        return cfg
    changes = {}
    for i, group in enumerate(cfg.groups):
        for j, layer in enumerate(group.layers):
            moe, at = isinstance(layer.ffn, MoEConfig), f"groups.{i}.layers.{j}"
            if weights == "int4":
                changes |= {f"{at}.ffn.weights": Int4Config()} if moe else {}
                continue
            changes[f"{at}.ffn.weights"] = Fp8Config()
            changes |= {f"{at}.ffn.shared_weights": Fp8Config()} if moe else {}
            if hasattr(layer.mixer, "weights"):
                changes[f"{at}.mixer.weights"] = Fp8Config()
    if not changes:
        raise UserError(f"--weights {weights}: this model has no matrices that are held so; "
                        "leave it at bf16")
    return override(cfg, changes)


def layout(job: Job, mesh, strategy: str = "ring") -> Plan:
    """The plan of a job on a mesh, real or abstract."""
    train = job.kind == "train"
    return Plan(mesh, order=job.order, strategy=strategy, train=train, remat=train)


def abstract_mesh(sizes: dict[str, int], kind: str | None = None) -> jax.sharding.AbstractMesh:
    """A mesh of no devices, which says where things lie and compiles nothing.

    kind  the `device_kind` of the TPU that it stands for; None: of any devices
    """
    device = None if kind is None else jax.sharding.AbstractDevice(kind, None, "tpu")
    lengths = tuple(sizes.get(axis, 1) for axis in AXES)
    return jax.sharding.AbstractMesh(lengths, AXES, abstract_device=device)


def shapes(tree, places):
    """Arrays that lie at their places, of which there are no numbers."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places
    )


def boxed(cfg: ModelConfig):
    """Parameters with the names of their dims, abstract."""
    return abstract_params(Model(cfg, local()))


def weights(job: Job, plan: Plan):
    """Abstract parameters at their places, in the dtypes in which a run holds them."""
    dtype = jnp.dtype(jnp.float32 if job.kind == "train" else job.dtype)
    return _weights(job.cfg, dtype, plan.train, plan.mesh)


# A search asks the same meshes for many contexts, and an estimate asks twice.
@functools.lru_cache(maxsize=256)
def _weights(cfg: ModelConfig, dtype: jnp.dtype, train: bool, mesh):
    def one(path, x):
        return jax.ShapeDtypeStruct(x.shape, leaf_dtype(path[-1].key, jnp.dtype(x.dtype), dtype))

    found = jax.tree_util.tree_map_with_path(one, nn.unbox(boxed(cfg)))
    return shapes(found, rules.shardings(boxed(cfg), mesh, rules.TRAIN if train else rules.SERVE))


@functools.lru_cache(maxsize=16)
def cache(job: Job, plan: Plan) -> Cache:
    """The abstract cache of a job that has one, at its places."""
    made = _cache(job, plan.ways)
    return shapes(made, plan.cache_shardings(made))


@functools.lru_cache(maxsize=256)
def _cache(job: Job, ways: int) -> Cache:
    return jax.eval_shape(functools.partial(
        empty_cache, job.cfg, job.batch, job.context, jnp.dtype(job.dtype), ways, job.latents
    ))


def row(job: Job, plan: Plan) -> tuple[int, int]:
    """(tokens of a row with its padding, the runs it is cut into) of prefill and train."""
    order = _order(job, plan.order, plan.ways)
    return order.length, order.runs


def place_of_last(job: Job, plan: Plan) -> int:
    """Where in its arranged row the last token lies."""
    return int(np.argmax(_order(job, plan.order, plan.ways).places == job.context - 1))


@functools.lru_cache(maxsize=256)
def _order(job: Job, kind: str, ways: int) -> Order:
    return make_order(kind, job.context, ways, run_length(job.cfg), lead_slots(job.cfg))
