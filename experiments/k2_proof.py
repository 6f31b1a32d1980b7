"""Do a training step and a decoding step of Kimi K2 at two million tokens fit 512 TPU chips?

Ask     Bytes per chip, all 61 layers, one row of 2,097,152 tokens: of a whole step with MuonClip,
        or of one more token behind a cache of so many.
Run     python -m experiments.k2_proof [--job train|decode] [--tokens 2097152]
Cost    train: 11 minutes of two cores that others used too, 481 s of CPU time, 3.3 GiB; decode:
        40 s. Needs libtpu (the extra [aot]) and no TPU.
Answer  v5p:8x8x8, of 95.7 GiB. train: 19.3 GiB of arguments, all donated, and 40.0 GiB of
        temporaries (27.8 and 51.1 when experts came as float32, what they bring back was cut into
        pieces that a TPU pads, and matrices of queries lay whole on every chip); of gradients
        alone, of bfloat16 weights and without an optimizer, it was 6.9 and 26.8, and 543 GB of
        temporaries without computing layers a second time, which does not fit. decode: 51.4 GiB of
        arguments and 0.01 GiB of temporaries.

The programs are those of a run (kimijax.planner.programs). train: float32 weights dealt over data
and seq, experts over expert = 4; zigzag. decode: bfloat16, experts over expert = 64, other weights
on every chip. Compiled by the TPU's own compiler, not run: no time is measured. `kimijax plan
--prove` does the same for other models, jobs and chips.
"""

import argparse
import os

from kimijax.cli import run_module

# Read once, when jax and libtpu are loaded.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

TOPOLOGY = "v5p:8x8x8"
SIZES = {"train": {"seq": 128, "expert": 4}, "decode": {"seq": 8, "expert": 64}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the proof."""
    parser.add_argument("--job", choices=sorted(SIZES), default="train")
    parser.add_argument("--tokens", type=int, default=2**21)


def main(args: argparse.Namespace) -> int:
    """Compile the program of a run and print what the compiler says; 1: it does not fit."""
    from kimijax import presets
    from kimijax.parallel.mesh import topology_mesh
    from kimijax.planner.job import Job, layout
    from kimijax.planner.prove import compiled

    job = Job(presets.kimi_k2(), args.job, args.tokens)
    proof = compiled(job, layout(job, topology_mesh(TOPOLOGY, SIZES[args.job])))
    if not proof.fits:
        print(proof.refused)
        return 1
    for what in ("arguments", "temporaries", "outputs", "donated"):
        print(f"{what}: {getattr(proof, what) / 2**30:.2f} GiB per chip of {TOPOLOGY}")
    return 0


if __name__ == "__main__":
    run_module(add_arguments, main, __doc__)
