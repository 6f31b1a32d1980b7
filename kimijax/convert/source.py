"""A Hugging Face checkpoint as a source of arrays: checked by name, dequantised."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from kimijax.checkpoint.common import brief
from kimijax.config import FP8_BLOCK, ModelConfig
from kimijax.convert.config import WRAPPER, from_hub, text_config
from kimijax.convert.header import TensorInfo
from kimijax.convert.keep import kept
from kimijax.convert.names import Rule, rules
from kimijax.convert.quant import dequantize_fp8, dequantize_int4
from kimijax.convert.tensors import TensorFiles, inside, open_directory
from kimijax.errors import UserError

PREFIX = "language_model."
VISION = tuple(f"{m}{x}." for m in ("", "model.") for x in ("vision_tower", "mm_projector"))
FLOATS = ("F32", "BF16", "F16")
GROUP = 32  # of int4
LARGEST_CONFIG = 1 << 24  # bytes
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
KEPT_FLOAT32 = ("bias", "A_log", "dt_bias")  # leaves that are float32 whatever the dtype
SHAPES = ("I32", "I64")  # dtypes of the shapes beside packed weights
# Bits of a float that are all set in NaN and infinity (in e4m3fn: in NaN, it has no infinity).
EXPONENTS = {
    "float32": (np.uint32, 0x7F800000), "bfloat16": (np.uint16, 0x7F80),
    "float16": (np.uint16, 0x7C00), "float8_e4m3fn": (np.uint8, 0x7F),
}
BLOCK = 2**16  # numbers looked at together, so that what is made of them stays in the cache


@dataclass(frozen=True)
class Source:
    """An open checkpoint; a context manager. `skipped` counts tensors that no text model needs."""

    directory: Path
    hub: dict  # its config.json
    cfg: ModelConfig
    files: TensorFiles
    forms: dict[str, str]  # rule name -> "as is", "fp8" or "int4"
    skipped: int

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *exception: object) -> None:
        self.files.close()

    def rules(self) -> Iterator[Rule]:
        """A rule per tensor of the model, in the order of layers."""
        return rules(self.cfg)

    def expanded(self) -> list[str]:
        """The tensors that are stored quantised and read as floats."""
        start = prefix(self.hub)
        return [start + name for name, form in self.forms.items() if form != "as is"]

    def read(self, rule: Rule) -> np.ndarray:
        """A hub tensor as numbers: in the dtype stored, float32 where it is expanded."""
        name = prefix(self.hub) + rule.name
        match self.forms[rule.name]:
            case "fp8":
                scale = self.files.read(f"{name}_scale_inv")
                return dequantize_fp8(self.files.read(name), scale, name=name)
            case "int4":
                packed, scale = (self.files.read(f"{name}_{x}") for x in ("packed", "scale"))
                return dequantize_int4(packed, scale, name=name)
        return self._finite(name, self.files.read(name))

    def info(self, rule: Rule) -> TensorInfo:
        """The tensor in the file that holds the numbers of a rule."""
        name = prefix(self.hub) + rule.name
        return self.files.info(f"{name}_packed" if self.forms[rule.name] == "int4" else name)

    def weight_shape_dtype(self) -> str:
        """How the shapes beside packed weights are stored (releases differ)."""
        found = (self.files.info(n) for n in self.files.names() if n.endswith(".weight_shape"))
        return next((info.dtype for info in found if info.dtype in SHAPES), "I64")

    def size(self, rule: Rule) -> int:
        """Its bytes in the file."""
        info = self.info(rule)
        return info.end - info.start

    def read_rows(self, rule: Rule, start: int, stop: int) -> np.ndarray:
        """Rows of a hub tensor that is stored as it is."""
        name = prefix(self.hub) + rule.name
        return self._finite(name, self.files.read_rows(name, start, stop))

    def _finite(self, name: str, array: np.ndarray) -> np.ndarray:
        check_finite(array, f"{self.files.info(name).file}: {name}")
        return array


def check_finite(array: np.ndarray, what: str) -> None:
    """UserError if floats hold NaN or infinity; arrays of anything else pass.

    what  the file and the tensor, for the message
    """
    if array.dtype.name not in EXPONENTS or not array.size:
        return
    word, mask = EXPONENTS[array.dtype.name]
    # By the bits: isfinite of 16-bit floats is ten times slower than reading them.
    words = array.reshape(-1).view(word)
    for at in range(0, words.size, BLOCK):
        if (words[at : at + BLOCK] & word(mask)).max() == mask:
            raise UserError(f"{what} is not finite everywhere; fetch it again, or mend it")


def prefix(hub: dict) -> str:
    """What stands before the names of the language model."""
    return PREFIX if hub.get("model_type") == WRAPPER else ""


def read_json(path: Path) -> dict:
    """A JSON object from a file that a stranger wrote, which lies in its directory."""
    real = inside(path.parent, path.name)
    try:
        if real.stat().st_size > LARGEST_CONFIG:
            raise UserError(f"{path}: is larger than any config")
        data = json.loads(
            real.read_text(encoding="utf-8"), object_pairs_hook=_unique, parse_float=_number,
            parse_constant=_number,
        )
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {brief(error)}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: must be a JSON object, not a {type(data).__name__}")
    return data


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """An object, in which no name is twice: readers differ in which of them they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        name = next(n for n, _ in pairs if n in seen or seen.add(n))
        raise ValueError(f"the name {name[:80]!r} is twice in one object; remove one")
    return found


def _number(text: str) -> float:
    """A float; NaN and infinity are no JSON, and 1e999 is none of a config."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no number; correct it")
    return value


def read_hub_config(path: Path) -> tuple[dict, ModelConfig]:
    """A hub's config.json as it is and as a model, its quantisation one that can be read."""
    hub = read_json(path)
    try:
        cfg = from_hub(hub)
        given = (x.get("quantization_config") for x in (text_config(hub), hub))
        check_quantization(next((x for x in given if x is not None), None))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return hub, cfg


def open_source(directory: Path, keep: bool = False) -> Source:
    """Open a hub checkpoint; every tensor must be there, of its shape, in a known form.

    keep  modules stay quantised as they are stored; UserError if none is, whole
    """
    hub, cfg = read_hub_config(directory / "config.json")
    files = open_directory(directory)
    try:
        names = set(files.names())
        if keep:
            cfg = kept(cfg, files, prefix(hub))
        forms, taken = {}, set()
        for rule in rules(cfg):
            forms[rule.name], used = _form(files, names, prefix(hub) + rule.name, rule)
            taken |= used
        skipped = _skipped(directory, names - taken, prefix(hub), len(cfg.layers))
    except BaseException:
        files.close()
        raise
    return Source(directory, hub, cfg, files, forms, skipped)


def check_quantization(quant: object) -> None:
    """UserError for a scheme whose numbers would be read wrongly."""
    if quant is None:
        return
    if not isinstance(quant, dict):
        raise UserError(f"quantization_config must be an object, got {quant!r:.80}")
    method = quant.get("quant_method")
    if method == "fp8":
        if quant.get("weight_block_size", [FP8_BLOCK] * 2) != [FP8_BLOCK] * 2:
            raise UserError(f"fp8 weight_block_size {quant['weight_block_size']} is not [128, 128]")
        for key, want in (("fmt", "e4m3"), ("activation_scheme", "dynamic")):
            if quant.get(key, want) != want:
                raise UserError(f"fp8 {key} {quant[key]!r:.80} is not supported, only {want!r}")
        return
    if method != "compressed-tensors":
        raise UserError(
            f"quantisation {method!r} is not supported: there are 'fp8' and 'compressed-tensors'"
        )
    if quant.get("format") != "pack-quantized":
        raise UserError(f"quantisation format {quant.get('format')!r} is not 'pack-quantized'")
    groups = quant.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise UserError(f"config_groups must be an object with a group, got {groups!r:.80}")
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        want = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
                "group_size": GROUP, "actorder": None}
        got = {k: weights.get(k) for k in want} if isinstance(weights, dict) else weights
        if got != want:
            raise UserError(f"quantisation group {name!r} has weights {got}, not {want}")


def _form(files: TensorFiles, names: set[str], name: str, rule: Rule) -> tuple[str, set[str]]:
    """How a tensor is stored, and the names of the tensors that hold it; shapes are checked."""
    if rule.dtypes:
        _check(files, name, rule.shape, rule.dtypes)
        beside = f"{name.removesuffix('_packed')}_shape"
        if name.endswith("_packed") and beside in names:
            _check_shape(files, beside, (rule.shape[0], rule.shape[1] * 8))
        return "as is", {name, beside} & names
    if f"{name}_packed" in names and len(rule.shape) == 2:
        n, k = rule.shape
        _check(files, f"{name}_packed", (n, -(-k // 8)), ("I32",))
        _check(files, f"{name}_scale", (n, -(-k // GROUP)), FLOATS)
        if f"{name}_shape" in names:
            _check_shape(files, f"{name}_shape", (n, k))
        return "int4", {f"{name}_{x}" for x in ("packed", "scale", "shape")} & names
    if files.info(name).dtype == "F8_E4M3":
        _check(files, name, rule.shape, ("F8_E4M3",))
        _check(files, f"{name}_scale_inv", tuple(-(-s // FP8_BLOCK) for s in rule.shape), FLOATS)
        return "fp8", {name, f"{name}_scale_inv"}
    _check(files, name, rule.shape, FLOATS)
    return "as is", {name}


def _check(files: TensorFiles, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    info = files.info(name)
    if info.dtype not in dtypes:
        raise UserError(f"{info.file}: {name!r} has dtype {info.dtype}, not {' or '.join(dtypes)}")
    if tuple(info.shape) != tuple(shape):
        raise UserError(
            f"{info.file}: {name!r} has shape {tuple(info.shape)}, its config makes it {shape}"
        )


def _check_shape(files: TensorFiles, name: str, shape: tuple[int, int]) -> None:
    """The tensor that says the shape of packed weights says the one they have."""
    _check(files, name, (2,), SHAPES)
    if (found := tuple(files.read(name).tolist())) != shape:
        raise UserError(f"{files.info(name).file}: {name!r} says {found}, its config {shape}")


def _skipped(directory: Path, rest: set[str], start: str, layers: int) -> int:
    """How many tensors are left out; UserError if one of them is not known to be superfluous."""
    slot = f"{start}model.layers.{layers}."  # that of multi-token prediction, if it is one
    extra = (*VISION, slot) if f"{slot}eh_proj.weight" in rest else VISION
    unknown = sorted(
        n for n in rest if not n.startswith(extra) and not n.endswith(".rotary_emb.inv_freq")
    )
    if unknown:
        raise UserError(
            f"{directory}: has {unknown[0]!r}, which nothing in this model takes "
            f"({len(unknown)} such tensors); is config.json that of these weights?"
        )
    return len(rest)


def leaf_dtype(leaf: str, declared: np.dtype, dtype: np.dtype) -> np.dtype:
    """The dtype in which a parameter is held when a model is loaded in `dtype`."""
    name = leaf.rsplit(".", 1)[-1]
    packed = declared != np.float32 or name.endswith("_scale")
    return np.dtype(declared if packed or name in KEPT_FLOAT32 else dtype)
