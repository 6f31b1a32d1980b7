"""The environment of tests, imported before jax: eight devices, programs that compile fast."""

import os
from importlib.metadata import version

# Tests compile much and compute little.
FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_force_host_platform_device_count=8",
]
if version("jaxlib").startswith("0.10."):  # later ones abort on it
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # two thirds of a compilation

# Devices wait for one another: with fewer threads than devices (two cores) they hang.
os.environ.setdefault("NPROC", "16")
if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
    given = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join([flag for flag in FLAGS if flag not in given] + given)
