"""Prints, as JSON, what a TPU's compiler says of a token behind a cache in some layers of K2.

A process of its own: flags that tests set for a CPU would reach the compiler too.
"""

import dataclasses
import json

from kimijax import presets
from kimijax.parallel.mesh import topology_mesh
from kimijax.planner.job import Job, layout
from kimijax.planner.programs import lower

TOKENS = {"dense": 131_072, "experts": 4096}  # a chip


def main() -> None:
    """Four chips, a row of all their tokens; dense layers, also with int8 latents, then two with
    experts.
    """
    # Twice as many layers of half as many bytes: positions, which are summed, are as small a part.
    cases = ("dense", 0, 4, None), ("dense", 0, 8, "int8"), ("experts", 1, 2, None)
    for kind, group, repeat, latents in cases:
        cfg = presets.kimi_k2()
        layers = dataclasses.replace(cfg.groups[group], repeat=repeat)
        cfg = dataclasses.replace(cfg, vocab=1024, groups=(layers,))
        job = Job(cfg, "decode", 4 * TOKENS[kind], latents=latents)
        plan = layout(job, topology_mesh("v5p:2x2x1", {"seq": 2, "expert": 2}))
        memory = lower(job, plan).compile().memory_analysis()
        print(json.dumps({
            "cache": memory.alias_size_in_bytes, "temp": memory.temp_size_in_bytes,
            "weights": memory.argument_size_in_bytes - memory.alias_size_in_bytes,
        }))


if __name__ == "__main__":
    main()
