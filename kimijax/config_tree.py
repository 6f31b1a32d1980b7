"""A configuration as a tree: named changes, and JSON there and back.

A foreign file is checked key by key before anything is built from it.
"""

import dataclasses
import difflib
import types
import typing
from dataclasses import fields, is_dataclass

from kimijax.config import LARGEST, ModelConfig
from kimijax.errors import UserError


def override(cfg, changes: dict[str, object]):
    """`override(cfg, {"groups.0.repeat": 4})`: a copy with nested fields replaced.

    A path names fields and, in tuples, indices. All changes of a dataclass are made at once, so
    its checks see the result alone. Unknown names raise UserError with the nearest.
    """
    tree: dict = {}
    for path, value in changes.items():
        *parents, last = path.split(".")
        node = tree
        for step in parents:
            node = node.setdefault(step, _Branch())
            if not isinstance(node, _Branch):
                raise UserError(f"{path!r} and a path above it are both given")
        if isinstance(node.get(last), _Branch):
            raise UserError(f"{path!r} and a path below it are both given")
        node[last] = value
    return _replace(cfg, tree, "")


def expanded(cfg: ModelConfig) -> ModelConfig:
    """The same model with all of its weights as floats."""
    return override(cfg, {
        f"groups.{i}.layers.{j}.{part}.{name}": None
        for i, group in enumerate(cfg.groups)
        for j, layer in enumerate(group.layers)
        for part in ("mixer", "ffn")
        for name in ("weights", "shared_weights") if hasattr(getattr(layer, part), name)
    })


class _Branch(dict):
    """Changes below a field; a plain dict would be a value."""


def _replace(node, changes: dict, where: str):
    if isinstance(node, tuple):
        for step in changes:
            if not step.isdigit() or int(step) >= len(node):
                raise UserError(f"{where}{step!r} is no index below {len(node)}")
        return tuple(_changed(x, str(i), changes, where) for i, x in enumerate(node))
    names = [f.name for f in fields(node)] if is_dataclass(node) else []
    for name in changes:
        if name not in names:
            raise UserError(f"{where}{name}: {_unknown(name, type(node).__name__, names)}")
    return dataclasses.replace(
        node, **{n: _changed(getattr(node, n), n, changes, where) for n in changes}
    )


def _changed(old, name: str, changes: dict, where: str):
    """The value of a field or item after the changes, itself where it has none."""
    if name not in changes:
        return old
    new = changes[name]
    return _replace(old, new, f"{where}{name}.") if isinstance(new, _Branch) else new


def _unknown(name: str, owner: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it has {names}"
    return f"{owner} has no field {name!r}, {hint}"


def to_dict(cfg) -> dict:
    """Plain JSON values; every dataclass carries its type's name."""
    if is_dataclass(cfg):
        return {"type": type(cfg).__name__} | {
            f.name: to_dict(getattr(cfg, f.name)) for f in fields(cfg)
        }
    return [to_dict(x) for x in cfg] if isinstance(cfg, tuple) else cfg


def from_dict(data: object, kind: type = ModelConfig, where: str = "config"):
    """The inverse of `to_dict`. Anything unknown, missing or of a wrong type raises UserError."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if data is None and type(None) in options:
        return None
    if typing.get_origin(kind) is tuple:
        if not isinstance(data, list):
            raise UserError(f"{where} must be a list, got {data!r}")
        return tuple(
            from_dict(x, typing.get_args(kind)[0], f"{where}.{i}") for i, x in enumerate(data)
        )
    known = {o.__name__: o for o in options if is_dataclass(o)}
    if known:
        return _build(data, known, where)
    if float in options and isinstance(data, int) and not isinstance(data, bool):
        if abs(data) > LARGEST:
            raise UserError(f"{where} must be at most {LARGEST}, got {str(data)[:40]}")
        return float(data)
    if type(data) not in options:
        raise UserError(f"{where} must be of type {kind}, got {data!r}")
    return data


def _build(data: object, known: dict[str, type], where: str):
    got = data.get("type") if isinstance(data, dict) else data
    if not isinstance(got, str) or got not in known:
        raise UserError(f"{where}.type must be one of {sorted(known)}, got {got!r}")
    cls = known[data["type"]]
    names = {f.name: f for f in fields(cls)}
    for name in data:
        if name not in names and name != "type":
            raise UserError(f"{where}: {_unknown(name, cls.__name__, list(names))}")
    hints = typing.get_type_hints(cls)
    missing = [
        n for n, f in names.items()
        if n not in data and f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}")
    return cls(**{n: from_dict(data[n], hints[n], f"{where}.{n}") for n in names if n in data})
