"""Weights in 8 and 4 bits: FP8 with a scale per square block, INT4 with a scale per group.

FP8   float8_e4m3fn [N, K], scale_inv float32 [ceil(N/128), ceil(K/128)]: W = fp8 * scale_inv,
      a product despite the name; the last blocks of a side may be partial
INT4  int32 [N, K/8], scale bfloat16 [N, K/32]: element j is the nibble at bits 4*(j%8) of word
      j//8, stored as q+8 with q in -8..7; W = q * scale, no zero point
"""

import ml_dtypes
import numpy as np

from kimijax.errors import UserError

FP8, BF16 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.bfloat16)
FP8_MAX, INT4_MAX = 448, 7
SCALES = (np.dtype(np.float32), BF16, np.dtype(np.float16))
# A table is several times faster than the cast.
FP8_VALUES = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)
ROWS = 1024  # worked on at once, so that temporaries stay small beside the result


def dequantize_fp8(
    weight: np.ndarray, scale_inv: np.ndarray, block: int = 128, name: str = "weight"
) -> np.ndarray:
    """float32 [N, K], exactly fp8 * scale rounded once; UserError names the weight and the fault.

    weight     float8_e4m3fn [N, K]
    scale_inv  float32, bfloat16 or float16 [ceil(N/block), ceil(K/block)]
    """
    _check_kind(name, "weight", weight, FP8)
    n, k = weight.shape
    _check_scale(name, weight, scale_inv, (-(-n // block), -(-k // block)), FP8_MAX)
    # The two codes of NaN; there is no infinity.
    codes = weight.view(np.uint8)
    if bad := int(np.count_nonzero((codes & 0x7F) == 0x7F)):
        raise UserError(f"{name} holds {bad} NaN among {weight.size} weights; fetch it again")
    columns = np.repeat(scale_inv.astype(np.float32), block, axis=1)[:, :k]
    out = FP8_VALUES[codes]
    for row, scale in enumerate(columns):
        out[row * block : (row + 1) * block] *= scale
    return out


def quantize_fp8(
    weight: np.ndarray, block: int = 128, name: str = "weight"
) -> tuple[np.ndarray, np.ndarray]:
    """(float8_e4m3fn [N, K], float32 scale_inv): each block's largest value becomes 448.

    weight  float [N, K]; numbers that are not finite raise UserError
    """
    weight = _finite(name, weight)
    n, k = weight.shape
    rows, columns = np.arange(0, n, block), np.arange(0, k, block)
    largest = np.abs(weight)
    for axis, starts in enumerate((rows, columns)):
        largest = np.maximum.reduceat(largest, starts, axis) if starts.size else largest
    scale = _usable(largest / np.float32(FP8_MAX))
    out = np.empty(weight.shape, FP8)
    for i, wide in zip(rows, np.repeat(scale, block, axis=1)[:, :k], strict=True):
        part = weight[i : i + block] / wide
        # A scale among the subnormals is coarse, and 465 would become NaN.
        out[i : i + block] = np.clip(part, -FP8_MAX, FP8_MAX).astype(FP8)
    return out, scale


def dequantize_int4(
    packed: np.ndarray, scale: np.ndarray, group: int = 32, name: str = "weight"
) -> np.ndarray:
    """float32 [N, K], exactly q * scale; UserError names the weight and the fault.

    packed  int32 [N, K/8]
    scale   bfloat16, float32 or float16 [N, K/group]
    """
    _check_kind(name, "packed weight", packed, np.dtype(np.int32))
    n, k = packed.shape[0], packed.shape[1] * 8
    if k % group:
        raise UserError(f"{name}: {packed.shape} words are no groups of {group} in {k} columns")
    _check_scale(name, packed, scale, (n, k // group), INT4_MAX + 1)
    out = np.empty((n, k // group, group), np.float32)
    for i in range(0, n, ROWS):
        rows = slice(i, i + ROWS)
        codes = unpack_int4(packed[rows]).reshape(-1, *out.shape[1:])
        np.multiply(codes, scale[rows].astype(np.float32)[..., None], out=out[rows])
    return out.reshape(n, k)


def quantize_int4(
    weight: np.ndarray, group: int = 32, name: str = "weight"
) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [N, K/8], bfloat16 scale [N, K/group]): each group's largest value becomes +-7.

    weight  float [N, K], K a multiple of the group; numbers that are not finite raise UserError
    """
    weight = _finite(name, weight)
    n, k = weight.shape
    if k % group or group % 8:
        raise ValueError(f"{name} {weight.shape}: {k} columns are no groups of {group} in words")
    groups = weight.reshape(n, k // group, group)
    scale = _usable((np.abs(groups).max(-1, initial=0) / np.float32(INT4_MAX)).astype(BF16))
    codes = np.rint(groups / scale.astype(np.float32)[..., None])
    codes = np.clip(codes, -INT4_MAX, INT4_MAX).astype(np.int8)
    return pack_int4(codes.reshape(n, k)), scale


def unpack_int4(packed: np.ndarray) -> np.ndarray:
    """int32 [N, K/8] -> int8 [N, K] in -8..7."""
    if packed.dtype != np.int32 or packed.ndim != 2:
        raise ValueError(f"packed int4 is int32 [N, K/8], not {packed.dtype} {packed.shape}")
    pairs = np.ascontiguousarray(packed, "<i4").view(np.uint8)
    out = np.empty((packed.shape[0], packed.shape[1] * 8), np.int8)
    out[:, 0::2], out[:, 1::2] = pairs & 15, pairs >> 4
    out -= 8
    return out


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """int8 [N, K] in -8..7 -> int32 [N, K/8], the inverse of `unpack_int4`."""
    if codes.dtype != np.int8 or codes.ndim != 2 or codes.shape[1] % 8:
        raise ValueError(f"codes are int8 [N, multiple of 8], not {codes.dtype} {codes.shape}")
    if codes.size and not -8 <= codes.min() <= codes.max() <= 7:
        raise ValueError(f"codes span {codes.min()}..{codes.max()}, not -8..7")
    nibbles = (codes + np.int8(8)).view(np.uint8)
    pairs = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return pairs.view("<i4").astype(np.int32, copy=False)


def _check_kind(name: str, what: str, array: np.ndarray, dtype: np.dtype) -> None:
    if array.dtype != dtype or array.ndim != 2:
        raise UserError(
            f"{name}: its {what} must be {dtype} with 2 dims, not {array.dtype} {array.shape}; "
            "is the quantisation of the config that of these weights?"
        )


def _check_scale(
    name: str, weight: np.ndarray, scale: np.ndarray, shape: tuple[int, int], largest: int
) -> None:
    """A scale that fits, and whose products with values up to `largest` are finite."""
    if scale.dtype not in SCALES or scale.shape != shape:
        raise UserError(
            f"{name}: its scale is {scale.dtype} {scale.shape}, but {weight.dtype} "
            f"{weight.shape} needs floats of shape {shape}"
        )
    wide = scale.astype(np.float32)
    # Written so that NaN fails too.
    bad = wide[~(np.abs(wide) <= np.finfo(np.float32).max / largest)]
    if bad.size:
        raise UserError(
            f"{name}: {bad.size} of its {scale.size} scales are too large or not finite, such as "
            f"{bad[0]}; fetch it again"
        )


def _finite(name: str, weight: np.ndarray) -> np.ndarray:
    """As float32, which it must fit in."""
    if weight.ndim != 2:
        raise ValueError(f"{name}: only matrices are quantised, not {weight.shape}")
    with np.errstate(over="ignore", invalid="ignore"):  # is refused in the next line
        weight = weight.astype(np.float32, copy=False)
    if bad := weight.size - int(np.count_nonzero(np.isfinite(weight))):
        raise UserError(f"{name} holds {bad} of {weight.size} numbers that are not finite")
    return weight


def _usable(scale: np.ndarray) -> np.ndarray:
    """1 where a block has no value large enough to have a scale."""
    return np.where(scale > 0, scale, scale.dtype.type(1))
