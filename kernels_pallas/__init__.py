"""Attention kernels that return a mergeable Partial. Needs jax only; knows nothing of kimijax."""
