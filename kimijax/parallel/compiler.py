"""Options of XLA that programs of TPUs need, by device: one place for runs and their proofs."""

Options = tuple[tuple[str, str], ...]

# Serving stacks bfloat16 weights of all layers. The compiler of tpu7x would bring every stack into
# tiles of 16 rows before the loop over layers, which holds all of them twice.
_SERVING: dict[str, Options] = {
    "TPU7x": (("xla_tpu_control_large_2nd_minor_layout_for_x16", "0"),),
}


def serving(device_kind: str) -> Options:
    """Of programs that read weights and do not change them; `device_kind` as jax names it."""
    return _SERVING.get(device_kind, ())
