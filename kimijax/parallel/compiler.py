"""What the compiler of TPUs is told of programs on a mesh, in a run and where one is planned."""

from jax.sharding import Mesh

# Chips whose SparseCores gather and scatter while the TensorCore computes, by their names in jax.
# v5e has none; for tpu7x the compiler takes the options and keeps its gathers where they were.
WITH_SPARSE_CORES = ("TPU v5", "TPU v5p", "TPU v6 lite")
# Told nothing, a TensorCore waits for every gather of a weight and every sum of gradients, whatever
# xla_enable_async_all_gather says; products that go on within a gather are refused but on v5e.
# "2d", "3d", "nd": also over mesh axes that wind through several dims of the torus. The names are
# those of libtpu 0.0.42, which jax 0.10 takes, to 0.0.52.
OFFLOADED = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "ENABLED",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "ENABLED",
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": True,
}
# One gather at a time, begun as late as the compiler thinks it may be, leaves those of experts, the
# largest, behind attention: so all of a layer's may be under way, and count as long ones.
EARLY = {
    "xla_tpu_enable_concurrent_sparse_core_offloading": True,
    "xla_tpu_sparse_core_offload_queuing_overlap_limit": 8,
    "xla_tpu_sparse_core_ici_overlap_limit": 8,
    "xla_max_concurrent_async_all_gathers": 8,
    "xla_tpu_sparse_core_all_gather_latency_multiplier": 30,
}
# The compiler of tpu7x would bring every stack of bfloat16 weights into tiles of 16 rows before the
# loop over layers, and hold all of them twice.
AS_STACKED = (("xla_tpu_control_large_2nd_minor_layout_for_x16", "0"),)


def options(mesh: Mesh) -> dict[str, str | bool | int] | None:
    """`compiler_options` of jax.jit for a training step on a mesh; None: the compiler's own."""
    if mesh.size == 1 or mesh.devices.flat[0].device_kind not in WITH_SPARSE_CORES:
        return None
    return OFFLOADED | EARLY


def serving(mesh: Mesh) -> tuple[tuple[str, str], ...]:
    """The same, as pairs, of programs that read weights and do not change them."""
    return AS_STACKED if mesh.devices.flat[0].device_kind == "TPU7x" else ()
