"""What the compiler of TPUs is told of programs on a mesh, in a run and where one is planned."""

from jax.sharding import Mesh

# Chips whose SparseCores can gather and scatter while the TensorCore computes, by their names in
# jax. v5e has none.
WITH_SPARSE_CORES = ("TPU v5", "TPU v5p", "TPU v6 lite", "TPU7x")
# Without them a chip waits for every gather of a weight and every sum of gradients: all-gathers and
# reduce-scatters are synchronous on its TensorCore, whatever xla_enable_async_all_gather says.
# "2d", "3d", "nd": also over mesh axes that wind through several dims of the torus.
OFFLOADED = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "ENABLED",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "ENABLED",
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": True,
}
# The compiler of tpu7x would bring every stack of bfloat16 weights into tiles of 16 rows before the
# loop over layers, and hold all of them twice.
AS_STACKED = (("xla_tpu_control_large_2nd_minor_layout_for_x16", "0"),)


def options(mesh: Mesh) -> dict[str, str | bool] | None:
    """`compiler_options` of jax.jit for a training step on a mesh; None: the compiler's own."""
    if mesh.size == 1 or mesh.devices.flat[0].device_kind not in WITH_SPARSE_CORES:
        return None
    return OFFLOADED


def serving(mesh: Mesh) -> tuple[tuple[str, str], ...]:
    """The same, as pairs, of programs that read weights and do not change them."""
    return AS_STACKED if mesh.devices.flat[0].device_kind == "TPU7x" else ()
