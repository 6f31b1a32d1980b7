"""8 and 4 bits are what the goldens say, bit for bit; what is rounded is off by half a step."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimijax.convert import quant
from kimijax.convert.load import load
from kimijax.convert.quant import (
    dequantize_fp8,
    dequantize_int4,
    pack_int4,
    quantize_fp8,
    quantize_int4,
    unpack_int4,
)
from kimijax.convert.source import check_finite, check_quantization
from kimijax.convert.tensors import open_directory
from kimijax.errors import UserError

GOLDENS = Path(__file__).parent / "goldens"
FP8, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
FLOATS = [np.float32, BF16, np.float16]


def golden(name):
    """The tensors of a golden by the last part of their names, and the answers."""
    with open_directory(GOLDENS / name) as files:
        found = {x.rpartition(".")[2]: files.read(x) for x in files.names()}
    with np.load(GOLDENS / name / "io.npz") as answers:
        return found, dict(answers)


def assert_bits(got, want):
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert got.tobytes() == want.tobytes()


def test_fp8_equals_the_golden():
    found, want = golden("quant_fp8_block128")
    assert_bits(found["weight"].view(np.uint8), want["weight_raw_u8"])
    assert_bits(found["weight_scale_inv"], want["weight_scale_inv"])
    got = dequantize_fp8(found["weight"], found["weight_scale_inv"])
    assert_bits(got, want["dequant"])
    np.testing.assert_allclose(want["x"] @ got.T, want["y"], rtol=1e-5, atol=1e-5)
    codes, scale = quantize_fp8(want["original"])
    assert_bits(codes, found["weight"])
    assert_bits(scale, found["weight_scale_inv"])


def test_every_code_of_fp8_equals_the_table():
    _, want = golden("quant_fp8_block128")
    codes, table = np.arange(256, dtype=np.uint8), want["e4m3fn_table"]
    good = ~np.isnan(table)
    assert list(codes[~good]) == [0x7F, 0xFF]
    got = dequantize_fp8(codes[good].view(FP8)[None], np.ones((1, 2), np.float32))
    assert_bits(got[0], table[good])


@pytest.mark.parametrize("rows", [96, 7])
def test_int4_equals_the_golden(monkeypatch, rows):
    monkeypatch.setattr(quant, "ROWS", rows)
    found, want = golden("quant_int4_g32")
    packed, scale = found["weight_packed"], found["weight_scale"]
    assert tuple(found["weight_shape"]) == want["q"].shape
    assert_bits(packed, want["weight_packed_i32"])
    assert_bits(unpack_int4(packed), want["q"])
    assert_bits(pack_int4(want["q"]), packed)
    got = dequantize_int4(packed, scale)
    assert_bits(got, want["dequant"])
    assert_bits(got.astype(BF16).astype(np.float32), want["dequant_bf16"])
    np.testing.assert_allclose(want["x"] @ got.T, want["y"], rtol=1e-5, atol=1e-5)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 5), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_packing_has_an_inverse(rows, words, seed):
    packed = np.random.default_rng(seed).integers(-(2**31), 2**31, (rows, words), np.int32)
    assert_bits(pack_int4(unpack_int4(packed)), packed)
    assert_bits(unpack_int4(packed[:, ::-1])[:, :8], unpack_int4(packed[:, -1:]))


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (3, 9), (130, 257), (0, 8), (8, 0)])
@pytest.mark.parametrize("kind", FLOATS)
def test_fp8_of_any_shape_equals_the_products(rng, shape, kind):
    block = 128 if shape[0] == 130 else 4
    codes = rng.integers(0, 127, shape, np.uint8) | rng.integers(0, 2, shape, np.uint8) << 7
    blocks = [-(-size // block) for size in shape]
    scale = rng.normal(size=blocks).astype(kind)
    want = codes.view(FP8).astype(np.float32)
    for i, j in np.ndindex(*shape):
        want[i, j] *= np.float32(scale[i // block, j // block])
    assert_bits(dequantize_fp8(codes.view(FP8), scale, block), want)


@pytest.mark.parametrize("magnitude", [1e-44, 9e-43, 9.5e-40, 1e-38, 1e-6, 1.0, 1e30, 1e37])
def test_rounding_stays_within_half_a_step(rng, magnitude):
    weight = (rng.uniform(-1, 1, (70, 96)) * magnitude).astype(np.float32)
    weight[:16] = 0
    codes, scale = quantize_fp8(weight, block=16)
    got, step = dequantize_fp8(codes, scale, 16), np.repeat(np.repeat(scale, 16, 0), 16, 1)[:70]
    assert not got[:16].any()
    # 3 bits of mantissa: half a step is 1/16 of the value, and 2^-10 of the scale near 0. Scales
    # among the subnormals are only good to half of the smallest of them, times 448.
    rough = 448 * 2.0**-149 if magnitude < 1e-35 else 0
    error = np.abs(got.astype(np.float64) - weight)
    assert (error <= np.maximum(np.abs(weight) / 16, step * 2.0**-10) * 1.001 + rough).all()
    packed, scale = quantize_int4(weight, group=16)
    assert packed.dtype == np.int32 and scale.dtype == BF16
    got = dequantize_int4(packed, scale, 16)
    assert not got[:16].any()
    step = np.repeat(scale.astype(np.float32), 16, 1)
    # The scale is rounded to 8 bits, so the largest code may be off by 7/256 of a step more.
    rough = 7 * 2.0**-133 if magnitude < 1e-35 else 0
    error = np.abs(got.astype(np.float64) - weight)
    assert (error <= step * (0.5 + 7 / 256) + rough).all()
    again = quantize_int4(got, group=16)
    assert_bits(dequantize_int4(*again, 16), got)


def test_halves_are_rounded_to_even():
    half = np.array([[7, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5]], np.float32)
    codes = unpack_int4(quantize_int4(half, group=8)[0])
    assert codes.tolist() == [[7, 0, 2, 2, 0, -2, -2, 4]]
    # Between 16 and 32 codes are 2 apart: 17 and 19 are halves, 18 lies between them.
    half = np.array([[448, 17, 19, 21, -17]], np.float32)
    assert quantize_fp8(half)[0].astype(np.float32).tolist() == [[448, 16, 20, 20, -16]]


def refusal(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments, name="experts.7.up")
    assert "experts.7.up" in str(caught.value) and str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, "signalling"])
def test_scales_that_are_not_finite_are_refused(kind, bad):
    scale = np.ones((2, 3), kind)
    if bad == "signalling":
        word = {4: np.uint32, 2: np.uint16}[scale.itemsize]
        scale.view(word)[1, 2] = int(np.array(np.inf, kind).view(word)) + 1
    else:
        scale[1, 2] = bad
    why = "1 of its 6 scales are too large or not finite"
    assert why in refusal(dequantize_fp8, np.zeros((3, 6), FP8), scale, 2)
    assert why in refusal(dequantize_int4, np.zeros((2, 12), np.int32), scale, 32)


def test_scales_whose_products_overflow_are_refused():
    scale = np.full((1, 1), 3e38, np.float32)
    assert "such as 3" in refusal(dequantize_fp8, np.zeros((1, 1), FP8), scale, 2)
    assert "such as 3" in refusal(dequantize_int4, np.zeros((1, 4), np.int32), scale, 32)
    limit = np.full((1, 1), np.finfo(np.float32).max / 448, np.float32)
    codes = np.array([[0x7E, 0xFE]], np.uint8).view(FP8)
    assert np.isfinite(dequantize_fp8(codes, limit)).all()


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_weights_that_are_nan_are_refused(code):
    codes = np.zeros((3, 6), np.uint8)
    codes[1, 5] = code
    message = refusal(dequantize_fp8, codes.view(FP8), np.ones((1, 1), np.float32), 128)
    assert "1 NaN among 18 weights" in message


def test_shapes_that_do_not_fit_are_named():
    one = np.ones((1, 1), np.float32)
    for call, arguments, parts in [
        (dequantize_fp8, (np.zeros((3, 6), FP8), one, 2), ["(3, 6)", "(1, 1)", "(2, 3)"]),
        (dequantize_fp8, (np.zeros((3, 6), FP8), one[0], 128), ["(3, 6)", "(1,)", "(1, 1)"]),
        (dequantize_fp8, (np.zeros((3, 6), np.int8), one, 128), ["int8", "float8_e4m3fn"]),
        (dequantize_fp8, (np.zeros(6, FP8), one, 128), ["(6,)", "2 dims"]),
        (dequantize_fp8, (np.zeros((3, 6), FP8), one.astype(np.int32), 128), ["int32 (1, 1)"]),
        (dequantize_int4, (np.zeros((3, 4), np.int32), one, 32), ["(3, 4)", "(1, 1)", "(3, 1)"]),
        (dequantize_int4, (np.zeros((3, 3), np.int32), one, 32), ["(3, 3)", "groups of 32 in 24"]),
        (dequantize_int4, (np.zeros((3, 4), np.int64), one, 32), ["int64", "int32"]),
    ]:
        message = refusal(call, *arguments)
        assert all(part in message for part in parts), message


def test_what_cannot_be_quantised_is_named():
    for bad in (np.nan, np.inf, 1e300):
        for call in (quantize_fp8, quantize_int4):
            assert "holds 1 of 32 numbers" in refusal(call, np.array([[bad] + [0.0] * 31]), 32)
    with pytest.raises(ValueError, match="24 columns are no groups of 32"):
        quantize_int4(np.zeros((2, 24), np.float32))
    with pytest.raises(ValueError, match="only matrices"):
        quantize_fp8(np.zeros(24, np.float32))
    with pytest.raises(ValueError, match=r"codes span -9\.\.0, not -8\.\.7"):
        pack_int4(np.array([[-9] + [0] * 7], np.int8))
    with pytest.raises(ValueError, match="multiple of 8"):
        pack_int4(np.zeros((2, 12), np.int8))
    with pytest.raises(ValueError, match=r"not float32 \(2, 8\)"):
        unpack_int4(np.zeros((2, 8), np.float32))


@pytest.mark.parametrize("kind", [*FLOATS, FP8])
def test_numbers_that_are_not_finite_are_found(kind):
    size = np.dtype(kind).itemsize
    good = np.arange(256 ** min(size, 2), dtype=f"u{size}").view(kind)  # subnormals and all
    with np.errstate(invalid="ignore"):
        good = good[np.isfinite(good)]
    check_finite(good, "x")
    check_finite(np.zeros((0, 3), kind), "x")
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        for at in (0, len(good)):
            with pytest.raises(UserError, match="f.safetensors: w is not finite"):
                check_finite(np.insert(good, at, np.array(bad, kind)), "f.safetensors: w")


GROUP = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


@pytest.mark.parametrize("scheme, match", [
    ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2'"),
    ({"quant_method": "fp8", "activation_scheme": "static"}, "activation_scheme 'static'"),
    (PACKED, "config_groups"),
    (PACKED | {"config_groups": None}, "config_groups"),
    (PACKED | {"config_groups": {"a": {"weights": GROUP | {"actorder": "group"}}}}, "actorder"),
])
def test_schemes_that_would_be_read_wrongly_are_refused(scheme, match, tmp_path):
    with pytest.raises(UserError, match=match):
        check_quantization(scheme)
    config = json.loads((GOLDENS / "kimi_k25_text_tiny" / "config.json").read_text())
    config["quantization_config"] = scheme
    config["text_config"]["quantization_config"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=match):
        load(tmp_path)
