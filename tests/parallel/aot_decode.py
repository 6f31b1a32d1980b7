"""Prints, as JSON, what a TPU's compiler says of a token behind a long cache in dense layers of K2.

A process of its own: flags that tests set for a CPU would reach the compiler too.
"""

import dataclasses
import json

from experiments.k2_proof import decoding
from kimijax import presets
from kimijax.parallel.mesh import topology_mesh
from kimijax.parallel.plan import Plan

TOKENS = 131_072  # a chip


def main() -> None:
    """Four chips, a row of all their tokens."""
    cfg = presets.kimi_k2()
    dense = dataclasses.replace(cfg.groups[0], repeat=4)
    cfg = dataclasses.replace(cfg, vocab=1024, groups=(dense,))
    plan = Plan(topology_mesh("v5p:2x2x1", {"seq": 2, "expert": 2}))
    memory = decoding(cfg, plan, 4 * TOKENS).compile().memory_analysis()
    print(json.dumps({"cache": memory.alias_size_in_bytes, "temp": memory.temp_size_in_bytes}))


if __name__ == "__main__":
    main()
