"""What the ring sends, read from the compiled program."""

import pytest

from experiments.ring_proof import BOTH, FORWARD, saved
from kimijax.planner import hlo


def test_latents_and_positions_travel_once_a_hop():
    ours, theirs, ratio = saved(grads=False)
    assert ours == 7 * (2 * (512 + 64) + 2 * 4)
    assert theirs == 7 * (2 * 64 * (192 + 128) + 2 * 4)
    assert ratio >= FORWARD


def test_gradients_travel_in_float32_and_arrive_home():
    ours, theirs, ratio = saved(grads=True)
    assert ours == 2 * 7 * (2 * (512 + 64) + 2 * 4) + 8 * 4 * (512 + 64)
    assert theirs == 2 * 7 * (2 * 64 * (192 + 128) + 2 * 4) + 8 * 4 * 64 * (192 + 128)
    assert ratio >= BOTH


PROGRAM = """
%body (p: f32[]) -> f32[] {
  %p = bf16[2,3]{1,0} parameter(0)
  %s = (bf16[2,3]{1,0:T(8,128)}, u32[]{:S(2)}) collective-permute-start(%p), channel_id=1
  %c = f32[] conditional(%p), branch_computations={%x}
  ROOT %d = bf16[2,3]{1,0} collective-permute-done(%s)
}

ENTRY %main (p: f32[]) -> f32[] {
  %w = f32[] while(%p), condition=%cond, body=%body, backend_config={TRIPS}
}
"""


def test_a_send_counts_as_often_as_its_loop_runs():
    program = hlo.parse(PROGRAM.replace("TRIPS", '"known_trip_count":{"n":"5"}'))
    assert hlo.sent_bytes(program) == 5 * 12
    (flight,) = hlo.flights(program.computations["body"])
    assert flight.bytes == 12
    assert [op.kind for op in flight.meanwhile] == ["conditional"]


def test_a_loop_of_unknown_length_that_sends_is_refused():
    with pytest.raises(ValueError, match="how often"):
        hlo.sent_bytes(hlo.parse(PROGRAM))
