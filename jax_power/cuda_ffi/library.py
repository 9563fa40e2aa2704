"""The compiled kernels as targets of `jax.ffi.ffi_call`: where the library is, and calls of its entry points.

The kernels are those that PyTorch runs, `libpower_kernels.so` in the folder of `torch_power`, which is looked at but never
imported. Beside it, `libpower_ffi.so` (csrc/ffi_binding.cpp) holds one XLA handler for each entry point. XLA gives the stream
and plans the workspace as one more result, so a call neither synchronises nor allocates and fits a command buffer.

Array fields are listed in one place a side: what `power.py` and `attention.py` pass to `run` here, `FIELDS` in the handlers.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bridge import spec
from jax_power import platforms

HOW_TO_BUILD = (
    "build it with: pip install --no-build-isolation . (a C++ compiler, nvcc, torch and jax must be installed), "
    "or set POWER_KERNELS to the path of a libpower_kernels.so that has libpower_ffi.so beside it"
)

OPERATIONS = ("attention_quadratic_forward", "attention_quadratic_backward", "chunked_forward", "chunked_backward")

_DTYPES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
_FORMS = {"attention": 0, "chunked": 1, "recurrent": 2}
# The handlers align the workspace by themselves to what the kernels ask for: XLA aligns a buffer to 128 bytes or less.
_ALIGNMENT = 256


_SIZES = ("b", "t", "t_kv", "h_q", "h_kv", "d", "e", "chunk_size")
_FLAGS = ("deg", "form", "dtype", "causal", "normalize", "saved", "gates")


class Shape(ctypes.Structure):
    """PowerAttentionShape."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES), ("scale", ctypes.c_double), *((name, ctypes.c_int32) for name in _FLAGS)
    )  # fmt: skip


def path() -> pathlib.Path | None:
    """The handlers: beside the file that POWER_KERNELS names, or in the folder of torch_power; None without either."""
    kernels = os.environ.get("POWER_KERNELS")
    if kernels:
        return pathlib.Path(kernels).with_name("libpower_ffi.so")
    found = importlib.util.find_spec("torch_power")  # of a package that is not inside another: nothing is executed
    if found is None or not found.submodule_search_locations:
        return None
    return pathlib.Path(found.submodule_search_locations[0]) / "lib" / "libpower_ffi.so"


@functools.cache
def load() -> ctypes.CDLL:
    """Load the handlers and, through them, the kernels, and register the handlers with XLA; once.

    Raises:
      ImportError: there are none.
    """
    file = path()
    if file is None or not file.exists():
        raise ImportError(f"the compiled kernels are not installed; {HOW_TO_BUILD}")
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        raise ImportError(f"the compiled kernels cannot be loaded from {file} ({error}); {HOW_TO_BUILD}") from error
    library.power_last_error.restype = ctypes.c_char_p
    for size in (library.power_chunked_saved_sm90, *(getattr(library, f"power_{name}_workspace_sm90") for name in OPERATIONS)):
        size.restype, size.argtypes = ctypes.c_int64, (ctypes.c_void_p, ctypes.c_void_p)
    for operation in OPERATIONS:
        handler = getattr(library, f"power_ffi_{operation}")
        jax.ffi.register_ffi_target(f"power_{operation}", jax.ffi.pycapsule(handler), platform="CUDA")
    return library


@functools.cache
def missing() -> str | None:
    """None when the kernels can be called, else what is missing."""
    try:
        load()
    except ImportError as error:
        return str(error)
    return platforms.not_hopper()


def run(
    operation: str,
    call: spec.PowerCall,
    operands: Mapping[str, Array | None],
    results: Mapping[str, tuple[tuple[int, ...], str] | None],
) -> list[Array | None]:
    """Call `operation` of the kernels.

    Args:
      operands: arrays by field name of PowerAttentionArrays; None is absent.
      results: shape and dtype by field name; None is absent.
    Returns:
      The results in their order, None for the absent ones.
    Raises:
      NotImplementedError: the kernels refuse the shape (the message is theirs).
    """
    names = [name for name, x in operands.items() if x is not None]
    wanted = {name: x for name, x in results.items() if x is not None}
    shape = shape_of(call, saved="saved" in names or "saved" in wanted)
    workspace = (workspace_bytes(operation, shape) + _ALIGNMENT,), "uint8"
    buffers = [jax.ShapeDtypeStruct(size, jnp.dtype(dtype)) for size, dtype in (*wanted.values(), workspace)]
    attributes: dict[str, Any] = {name: np.int64(getattr(shape, name)) for name in (*_SIZES, *_FLAGS)}
    attributes |= {"scale": np.float64(call.scale), "operands": " ".join(names), "results": " ".join(wanted)}
    arrays = platforms.vary_alike([operands[name] for name in names])
    *computed, _ = jax.ffi.ffi_call(f"power_{operation}", buffers)(*arrays, **attributes)
    found = dict(zip(wanted, computed, strict=True))
    return [found.get(name) for name in results]


def like(x: Array | None) -> tuple[tuple[int, ...], str] | None:
    """Shape and dtype of a result that is like `x`; None for None."""
    return None if x is None else (x.shape, str(x.dtype))


def shape_of(call: spec.PowerCall, saved: bool = False) -> Shape:
    """The call as a PowerAttentionShape."""
    return Shape(
        call.b, call.t, call.t_kv, call.h_q, call.h_kv, call.d, call.e, call.chunk_size, call.scale,
        call.deg, _FORMS[call.form], _DTYPES[call.dtypes[0]], call.causal, call.normalize, saved, call.has_gate,
    )  # fmt: skip


def workspace_bytes(operation: str, shape: Shape) -> int:
    """Bytes of scratch memory that an operation needs for `shape`."""
    return _bytes(f"power_{operation}_workspace_sm90", shape)


def saved_bytes(call: spec.PowerCall) -> int:
    """Bytes that the chunked forward pass can hand to the backward pass."""
    return _bytes("power_chunked_saved_sm90", shape_of(call))


def _bytes(function: str, shape: Shape) -> int:
    """What a function of the library that counts bytes says.

    Raises:
      NotImplementedError: the kernels refuse the shape (the message is theirs).
    """
    library = load()
    size = getattr(library, function)(ctypes.addressof(shape), None)
    if size < 0:
        raise NotImplementedError(library.power_last_error().decode())
    return size
