"""Layers, parameters and cache of a preset or a checkpoint, without reading a weight.

  kimijax describe kimi_k2
  kimijax describe DIR --json
"""

import argparse
import json
from typing import TYPE_CHECKING

from kimijax.commands.paths import path

if TYPE_CHECKING:
    from kimijax.config import ModelConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kimijax describe`."""
    parser.add_argument("model", metavar="NAME|DIR", type=path,
        help="a preset, or a checkpoint directory")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Print what the model is."""
    from kimijax.metrics import describe

    name, cfg = args.model, config_of(args.model)
    facts = {"model": name} | describe(cfg)
    print(json.dumps(facts, indent=1) if args.json else _text(facts))
    return 0


def config_of(name: str) -> "ModelConfig":
    """The config of a preset or a checkpoint directory; UserError: it is neither."""
    import difflib
    from pathlib import Path

    from kimijax.convert.load import read_config
    from kimijax.errors import UserError
    from kimijax.presets import PRESETS

    if name in PRESETS:
        return PRESETS[name]()
    if Path(name).is_dir():
        return read_config(Path(name))
    near = difflib.get_close_matches(name, PRESETS, 1)
    hint = f"did you mean {near[0]}? There" if near else "there"
    raise UserError(
        f"{name!r:.200} is neither a directory nor a preset: {hint} are {', '.join(PRESETS)}"
    )


def _text(facts: dict) -> str:
    lines = [facts["model"]]
    lines += [f"  {count:>3} x {kind}" for kind, count in facts["layers"].items()]
    total, active = facts["parameters"], facts["active_parameters"]
    lines += [
        f"parameters {total:,}, active per token {active:,} "
        f"({facts['active_parameters_without_embedding']:,} without embedding and head)",
        f"cache {facts['cache_bytes_per_token']:,} bytes per token in {facts['cache_dtype']}, "
        f"state {facts['state_bytes_per_sequence']:,} bytes per sequence",
    ]
    if facts["context"]:
        whole = facts["cache_bytes_per_token"] * facts["context"] / 2**30
        lines.append(f"context {facts['context']:,} positions: {whole:,.2f} GiB of cache")
    return "\n".join(lines)
