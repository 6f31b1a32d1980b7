"""What both kinds of checkpoint need: trees compared by name, files that reach the disk."""

import os
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np


def describe(leaves: dict[str, object]) -> dict[str, str]:
    """Name -> "float32 (2, 3)"."""
    whole = {n: x if hasattr(x, "dtype") else np.asarray(x) for n, x in leaves.items()}
    return {name: f"{x.dtype} {tuple(x.shape)}" for name, x in whole.items()}


def difference(found: dict[str, str], wanted: dict[str, str]) -> str | None:
    """What keeps `found` from being `wanted`, as "lacks ..." or "has ..."; None: nothing."""
    faults = []
    if missing := wanted.keys() - found.keys():
        faults.append(f"lacks {_some(missing)}")
    if unknown := found.keys() - wanted.keys():
        faults.append(f"has {_some(unknown)}, which nothing takes")
    if faults:
        return " and ".join(faults)
    wrong = [name for name in wanted if found[name] != wanted[name]]
    return f"has {wrong[0]} as {found[wrong[0]]}, not {wanted[wrong[0]]}" if wrong else None


def _some(names: Collection[str]) -> str:
    first = repr(min(names))[:80]
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"


def sync(paths: Iterable[Path]) -> None:
    """Files and directories reach the disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def brief(error: Exception) -> str:
    """Its message on one line, cut where a foreign file made it long."""
    return " ".join(str(error).split())[:300] or type(error).__name__
