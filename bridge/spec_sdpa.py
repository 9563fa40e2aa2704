"""Scaled dot-product attention's contract in code: what a call is, and the checks of both twins' arguments.

Nothing here imports JAX or PyTorch. The two public functions mirror two different framework functions, so each twin has
its own check, with its framework's exception types and texts; what they agree on after that is one `SdpaCall`.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any

from bridge.spec import FLOAT_DTYPES, dtype_name

# What PyTorch's C++ side calls the dtypes in its messages.
CPP_DTYPES = {
    "float16": "c10::Half", "bfloat16": "c10::BFloat16", "float32": "float", "float64": "double",
    "int8": "signed char", "uint8": "unsigned char", "int16": "short int", "int32": "int", "int64": "long int",
}  # fmt: skip

# Dropout's random bits: Philox 4×32 (Salmon et al., 2011). Counter (key // 4, query, head, 0), key (low, high word of
# the batch element's seed); word `key % 4` decides on that key.
PHILOX_ROUNDS = 7
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_STEPS = (0x9E3779B9, 0xBB67AE85)


@dataclasses.dataclass(frozen=True)
class SdpaCall:
    """A checked call in plain numbers: all that an implementation needs beside the arrays.

    Query i sees key j unless `causal` and j > i (upper left: both count from 0), or `window` = (left, right) and j is
    outside i − left … i + right, or the mask is False there, or a length excludes i or j. `bias` and `mask` are the
    shapes of those operands, four axes (batch, query heads, queries, keys), each the full size or 1; None without them.
    """

    b: int
    t: int
    s: int
    h_q: int
    h_kv: int
    d: int
    e: int
    scale: float
    dtype: str
    causal: bool = False
    window: tuple[int, int] | None = None
    bias: tuple[int, ...] | None = None
    mask: tuple[int, ...] | None = None
    bias_grad: bool = False
    query_lengths: bool = False
    key_lengths: bool = False
    dropout_p: float = 0.0

    @property
    def group(self) -> int:
        """Query heads that read one key-value head."""
        return self.h_q // self.h_kv if self.h_kv else 1

    @property
    def compute_dtype(self) -> str:
        """Dtype of everything between reading the inputs and rounding the results."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def may_hide_rows(self) -> bool:
        """Whether some query may see no key at all (upper-left causality alone never does that)."""
        return self.s == 0 or self.key_lengths or any(x is not None for x in (self.window, self.bias, self.mask))


def plain_band(causal: bool, window: tuple[int, int] | None, t: int, s: int) -> tuple[bool, tuple[int, int] | None]:
    """Causality and window that say the same, without a window where none is needed."""
    if window is None or window[0] < t - 1 or (0 != window[1] < s - 1 and not (causal and window[1] > 0)):
        return causal, window
    return causal or window[1] < s - 1, None


def default_scale(d: int) -> float:
    """1/sqrt(d), and infinity for d = 0, where every score is an empty sum."""
    return 1.0 / math.sqrt(d) if d else math.inf


def dropout_threshold(dropout_p: float) -> int:
    """A weight is kept if its 32 random bits, read as an unsigned integer, are at least this: round(p · 2³²)."""
    return round(dropout_p * 2**32)


def dropout_gain(dropout_p: float) -> float:
    """What a kept weight is multiplied by: 1/(1 − p), and 0 for p = 1, where none is kept."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# torch.nn.functional.scaled_dot_product_attention
# ---------------------------------------------------------------------------------------------------------------------


def check_torch_kinds(
    tensor: type, query: Any, key: Any, value: Any, attn_mask: Any, is_causal: Any, enable_gqa: Any
) -> None:
    """Raise TypeError, in the words of PyTorch's argument parser, for an argument of the wrong Python type."""
    if not (isinstance(query, tensor) and isinstance(key, tensor) and isinstance(value, tensor)):
        for position, (name, x) in enumerate((("query", query), ("key", key), ("value", value)), start=1):
            if not isinstance(x, tensor):
                raise _torch_type_error(f"'{name}' (position {position})", "Tensor", x)
    if attn_mask is not None and not isinstance(attn_mask, tensor):
        raise _torch_type_error("'attn_mask'", "Tensor", attn_mask)
    if not isinstance(is_causal, bool):
        raise _torch_type_error("'is_causal'", "bool", is_causal)
    if not isinstance(enable_gqa, bool):
        raise _torch_type_error("'enable_gqa'", "bool", enable_gqa)


def check_torch_number(tensor: Any, name: str, x: Any) -> float:
    """Return `x` as a float; raise TypeError unless it is a number, or a tensor of one element that needs no
    gradient."""
    if type(x) is float:
        return x
    plain_tensor = isinstance(x, tensor) and len(x.shape) == 0 and not x.requires_grad
    if not plain_tensor and not isinstance(x, numbers.Real):
        raise _torch_type_error(f"'{name}'", "float", x)
    return float(x)


def _torch_type_error(name: str, wanted: str, got: Any) -> TypeError:
    return TypeError(f"scaled_dot_product_attention(): argument {name} must be {wanted}, not {type(got).__name__}")


def check_torch(
    query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: float, is_causal: bool, enable_gqa: bool
) -> None:
    """Check shapes, dtypes, devices and numbers of a call of `torch_power.scaled_dot_product_attention`.

    Raises:
      RuntimeError: as PyTorch raises, in its words where they name the cause and in ours where they do not.
      NotImplementedError: (a RuntimeError) the dtype is not a floating-point one of 16 to 64 bits.
      IndexError: `enable_gqa` on operands without an axis of heads.
    """
    qkv = {"query": query, "key": key, "value": value}
    ranks = {name: len(x.shape) for name, x in qkv.items()}
    if len({x.dtype for x in qkv.values()}) > 1:
        _raise_unequal("dtype", {name: _cpp_dtype(x) for name, x in qkv.items()}, "dtype")
    if len({x.device.type for x in qkv.values()}) > 1:
        _raise_unequal("device type", {name: x.device for name, x in qkv.items()}, "device")
    if min(ranks.values()) < 2:
        got = " ".join(f"{'and ' if name == 'value' else ''}{name}.dim: {rank}" for name, rank in ranks.items())
        raise RuntimeError(f"Expected query, key, and value to all be  at least 2 dimensional, but got {got} instead.")
    if dtype_name(query) not in FLOAT_DTYPES:
        raise NotImplementedError(f"query: dtype {dtype_name(query)} is not one of {', '.join(FLOAT_DTYPES)}")
    if attn_mask is not None:
        if is_causal:
            raise RuntimeError(
                "_scaled_dot_product_attention: Explicit attn_mask should not be set when is_causal=True"
            )
        if dtype_name(attn_mask) not in ("bool", "float32", dtype_name(query)):
            raise RuntimeError(
                "Expected attn_mask dtype to be bool or float or to match query dtype, but got "
                f"attn_mask.dtype: {_cpp_dtype(attn_mask)} and  query.dtype: {_cpp_dtype(query)} instead."
            )
        if attn_mask.device != query.device:
            raise RuntimeError(f"Tensor on device {attn_mask.device} is not on the expected device {query.device}!")
    if not 0.0 <= dropout_p <= 1.0:
        raise RuntimeError(f"dropout probability has to be between 0 and 1, but got {dropout_p}")
    if query.shape[-1] != key.shape[-1]:
        raise RuntimeError(
            f"Expected query and key to have the same head size, but got {query.shape[-1]} and {key.shape[-1]}."
        )
    if key.shape[-2] != value.shape[-2]:
        raise RuntimeError(
            f"Expected key and value to have the same length, but got {key.shape[-2]} and {value.shape[-2]}."
        )

    if enable_gqa:
        for rank in ranks.values():
            if rank < 3:
                raise IndexError(
                    f"Dimension out of range (expected to be in range of [-{rank}, {rank - 1}], but got -3)"
                )
        heads = [x.shape[-3] for x in qkv.values()]
        if any(h == 0 and heads[0] or h and heads[0] % h for h in heads[1:]):
            raise RuntimeError(
                "Number of heads in key and value must divide the number of heads in query, but got "
                f"{heads[1]} and {heads[2]} for {heads[0]}."
            )
        leading = [(*x.shape[:-3], heads[0]) for x in qkv.values()]
    else:
        leading = [x.shape[:-2] for x in qkv.values()]
    scores = (*broadcast_shapes(leading[0], leading[1]), query.shape[-2], key.shape[-2])
    broadcast_shapes(scores[:-2], leading[2])
    if attn_mask is not None:
        together = broadcast_shapes(scores, attn_mask.shape)
        if together != scores:
            raise RuntimeError(f"output with shape {list(scores)} doesn't match the broadcast shape {list(together)}")


def broadcast_shapes(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    """The shape that `a` and `b` broadcast to; raise RuntimeError in PyTorch's words if they do not."""
    rank = max(len(a), len(b))
    a, b = (1,) * (rank - len(a)) + tuple(a), (1,) * (rank - len(b)) + tuple(b)
    for axis, (m, n) in enumerate(zip(a, b, strict=True)):
        if m != n and m != 1 and n != 1:
            raise RuntimeError(
                f"The size of tensor a ({m}) must match the size of tensor b ({n}) at non-singleton dimension {axis}"
            )
    return tuple(n if m == 1 else m for m, n in zip(a, b, strict=True))


def _cpp_dtype(x: Any) -> str:
    return CPP_DTYPES.get(dtype_name(x), dtype_name(x))


def _raise_unequal(what: str, values: dict[str, Any], attribute: str) -> None:
    got = " ".join(f"{'and ' if name == 'value' else ''}{name}.{attribute}: {x}" for name, x in values.items())
    raise RuntimeError(f"Expected query, key, and value to have the same {what}, but got {got} instead.")


# ---------------------------------------------------------------------------------------------------------------------
# jax.nn.dot_product_attention
# ---------------------------------------------------------------------------------------------------------------------


def check_jax(
    query: Any, key: Any, value: Any, bias: Any, mask: Any, query_seq_lengths: Any, key_value_seq_lengths: Any
) -> None:
    """Check shapes and dtypes of a call of `jax_power.dot_product_attention`, operands already made four-dimensional.

    Raises:
      ValueError: in JAX's words; also where JAX stops at an assertion or an error of broadcasting or division. Values
        may have another head size than keys, which JAX does not allow.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if len(x.shape) != 4:
            raise ValueError(f"{name} ndim should be 4, but got {len(x.shape)}")
    b, s, h_kv, d = key.shape
    t, h_q = query.shape[1:3]
    _check_jax(value, (b, s, h_kv, -1), dtype_name(key), "value")
    _check_jax(query, (b, -1, -1, d), dtype_name(key), "query")
    if dtype_name(query) not in FLOAT_DTYPES:
        raise ValueError(f"query dtype should be one of {', '.join(FLOAT_DTYPES)}, but got {dtype_name(query)}")
    _check_jax(mask, (-1,) * 4, "bool", "mask")
    _check_jax(bias, (-1,) * 4, None, "bias")
    _check_jax(query_seq_lengths, (b,), "int32", "query_seq_lengths")
    _check_jax(key_value_seq_lengths, (b,), "int32", "key_value_seq_lengths")
    if h_kv == 0 and h_q or h_kv and h_q % h_kv:
        raise ValueError(f"The number of query heads must be a multiple of key/value heads, but got {h_q} vs {h_kv}")
    for name, x in (("bias", bias), ("mask", mask)):
        if x is not None and any(n not in (1, full) for n, full in zip(x.shape, (b, h_q, t, s), strict=True)):
            raise ValueError(f"{name} shape should be broadcastable to {[b, h_q, t, s]}: but got {tuple(x.shape)}")


def _check_jax(x: Any, shape: tuple[int, ...], dtype: str | None, name: str) -> None:
    if x is None:
        return
    if len(x.shape) != len(shape):
        raise ValueError(f"{name} ndim should be {len(shape)}, but got {len(x.shape)}")
    if dtype is not None and dtype_name(x) != dtype:
        raise ValueError(f"{name} dtype should be {dtype}, but got {dtype_name(x)}")
    if any(wanted not in (-1, n) for wanted, n in zip(shape, x.shape, strict=True)):
        raise ValueError(f"{name} shape should be {list(shape)}: but got {tuple(x.shape)}")


def check_window(local_window_size: Any) -> tuple[int, int] | None:
    """Return (left, right), an integer standing for both; raise ValueError for anything but integers or None."""
    if local_window_size is None:
        return None
    pair = (local_window_size,) * 2 if isinstance(local_window_size, numbers.Integral) else local_window_size
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(n, numbers.Integral) for n in pair):
        raise ValueError(f"local_window_size should be an integer or a pair of integers, but got {local_window_size!r}")
    return int(pair[0]), int(pair[1])
