"""The compiled kernels through ctypes: the structures of `csrc/abi.h`, and calls on the current CUDA stream.

No call synchronises or allocates on the host side of the device: scratch comes from PyTorch's caching allocator, so calls
can be captured in a CUDA graph and follow the stream they are made on.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bridge import spec
from torch_power import _library

# int64: seeds, whose dtype is not read.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.bool: 4, torch.int64: 0}
_DTYPE_NAMES = {str(dtype).removeprefix("torch."): number for dtype, number in _DTYPES.items()}
_FORMS = {"attention": 0, "chunked": 1, "recurrent": 2}
_ERRORS = {1: NotImplementedError, 2: ValueError}


class Array(ctypes.Structure):
    """PowerArray: address, strides in elements, dtype."""

    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 4), ("dtype", ctypes.c_int32))


class Shape(ctypes.Structure):
    """PowerAttentionShape."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("b", "t", "t_kv", "h_q", "h_kv", "d", "e", "chunk_size")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("deg", "form", "dtype", "causal", "normalize", "saved")),
    )


class Arrays(ctypes.Structure):
    """PowerAttentionArrays; what is not set is absent."""

    _fields_ = tuple(
        (name, Array)
        for name in "q k v log_g s0 z0 y norm s z dy ds dz dq dk dv dlog_g ds0 dz0 saved".split()
    )  # fmt: skip


@functools.cache
def load() -> ctypes.CDLL:
    """The kernel library: the file that POWER_KERNELS names, or the one installed with the package.

    Raises:
      ImportError: there is none, or it was built without the kernels for Hopper.
    """
    path = _library.kernels_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"the compiled kernels cannot be loaded from {path} ({error}); {_library.HOW_TO_BUILD}") from error
    if not hasattr(library, "power_attention_quadratic_forward_sm90"):
        raise ImportError(f"{path} was built without nvcc and has no kernels for Hopper; {_library.HOW_TO_BUILD}")
    library.power_last_error.restype = ctypes.c_char_p
    return library


@functools.cache
@torch.compiler.assume_constant_result  # torch.compile cannot look at files
def missing() -> str | None:
    """None when the kernels can run here, else what is missing."""
    if not torch.cuda.is_available():
        return "no CUDA device: the kernels run on a Hopper GPU"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        return f"compute capability {major}.{minor}: the kernels run on a Hopper GPU (9.0)"
    try:
        load()
    except ImportError as error:
        return str(error)
    return None


@functools.cache
def _entry(operation: str) -> tuple[Any, Any]:
    """The workspace and the run function of an operation, as power_<operation>[_workspace]_sm90."""
    library = load()
    workspace, run = getattr(library, f"power_{operation}_workspace_sm90"), getattr(library, f"power_{operation}_sm90")
    workspace.restype, workspace.argtypes = ctypes.c_int64, (ctypes.c_void_p, ctypes.c_void_p)
    run.restype = ctypes.c_int32
    run.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
    return workspace, run


def describe(x: Tensor) -> Array:
    """A tensor of at most four axes as a PowerArray."""
    return Array(x.data_ptr(), (ctypes.c_int64 * 4)(*x.stride()), _DTYPES.get(x.dtype, 0))


def shape_of(call: spec.PowerCall, saved: bool = False) -> Shape:
    """The call as a PowerAttentionShape."""
    return Shape(
        call.b, call.t, call.t_kv, call.h_q, call.h_kv, call.d, call.e, call.chunk_size, call.scale,
        call.deg, _FORMS[call.form], _DTYPE_NAMES[call.dtypes[0]], call.causal, call.normalize, saved,
    )  # fmt: skip


def saved_bytes(operation: str, call: spec.PowerCall) -> int:
    """What power_<operation>_saved_sm90 says: bytes that the forward pass can hand to the backward pass."""
    function = getattr(load(), f"power_{operation}_saved_sm90")
    function.restype, function.argtypes = ctypes.c_int64, (ctypes.c_void_p, ctypes.c_void_p)
    shape = shape_of(call)  # kept: its address alone does not keep it alive
    size = function(ctypes.addressof(shape), None)
    _check(1 if size < 0 else 0)
    return size


def run(operation: str, call: spec.PowerCall, arrays: Mapping[str, Tensor | None]) -> None:
    """Run `operation` on the current stream of q's device.

    Args:
      arrays: PowerAttentionArrays by field name; None and missing names are absent.
    Raises:
      NotImplementedError, ValueError, RuntimeError: the kernels refused the call (the message is theirs).
    """
    q = arrays["q"]
    shape = shape_of(call, arrays.get("saved") is not None)
    described = Arrays(**{name: describe(x) for name, x in arrays.items() if x is not None})
    run_described(operation, shape, described, q.device)


def run_described(operation: str, shape: ctypes.Structure, arrays: ctypes.Structure, device: torch.device) -> None:
    """Run `operation` on the current stream of `device`; the structures are those of its header.

    Raises:
      NotImplementedError, ValueError, RuntimeError: the kernels refused the call (the message is theirs).
    """
    workspace_bytes, entry = _entry(operation)
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        size = workspace_bytes(ctypes.addressof(shape), stream)
        _check(1 if size < 0 else 0)
        workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
        _check(entry(ctypes.addressof(shape), ctypes.addressof(arrays), workspace.data_ptr(), size, stream))


def _check(status: int) -> None:
    if status:
        raise _ERRORS.get(status, RuntimeError)(load().power_last_error().decode())
