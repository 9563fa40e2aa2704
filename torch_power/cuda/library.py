"""The compiled kernels for Hopper: where they are, why not when they are not, and what all their callers ask of them.

The operators torch.ops.torch_power.*_cuda (csrc/torch_binding_cuda.cpp) run them on the current CUDA stream. No call
synchronises; outputs and scratch come from PyTorch's caching allocator, so calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from bridge import spec
from torch_power import _library
from torch_power.calls import remembered

_DTYPES = {"bfloat16": 2, "float16": 3}  # PowerDtype
FORMS = {"attention": 0, "chunked": 1}  # PowerForm


class Shape(ctypes.Structure):
    """PowerAttentionShape."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("b", "t", "t_kv", "h_q", "h_kv", "d", "e", "chunk_size")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("deg", "form", "dtype", "causal", "normalize", "saved", "gates")),
    )


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
    if reason := _library.missing():
        raise ImportError(reason)
    if not (hasattr(library, "power_chunked_saved_sm90") and hasattr(torch.ops.torch_power, "power_forward_cuda")):
        raise ImportError(f"{path} was built without nvcc and has no kernels for Hopper; {_library.HOW_TO_BUILD}")
    library.power_last_error.restype = ctypes.c_char_p
    return library


@torch.compiler.assume_constant_result  # torch.compile cannot look at files, and warns of a cache
def missing() -> str | None:
    """None when the kernels can run here, else what is missing."""
    return _missing()


@functools.cache
def _missing() -> str | None:
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
def operator(name: str) -> Any:
    """The operator torch_power::`name`_cuda."""
    load()
    return getattr(torch.ops.torch_power, f"{name}_cuda").default


def options(call: spec.PowerCall, form: str) -> tuple[int, float, bool, bool, int, int]:
    """What the operators of power attention take beside arrays."""
    return call.deg, call.scale, call.causal, call.normalize, FORMS[form], call.chunk_size


@remembered
def saved_bytes(call: spec.PowerCall) -> int:
    """Bytes that the forward pass of the chunked form can hand to the backward pass.

    Raises:
      NotImplementedError: the kernels refuse the call (the message is theirs).
    """
    sizes = (int(n) for n in (call.b, call.t, call.t_kv, call.h_q, call.h_kv, call.d, call.e, call.chunk_size))
    shape = Shape(*sizes, call.scale, call.deg, FORMS["chunked"], _DTYPES[call.dtypes[0]], call.causal, call.normalize)
    function = load().power_chunked_saved_sm90
    function.restype, function.argtypes = ctypes.c_int64, (ctypes.c_void_p, ctypes.c_void_p)
    size = function(ctypes.addressof(shape), None)
    if size < 0:
        raise NotImplementedError(load().power_last_error().decode())
    return size
