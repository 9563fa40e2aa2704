"""Scaled dot-product attention on Hopper: glue between the raw interface and the kernels in `csrc/sdpa`."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from bridge.spec_sdpa import SdpaCall
from torch_power.cuda import library

LARGEST_HEAD = 256


class Shape(ctypes.Structure):
    """PowerSdpaShape."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("b", "h_q", "h_kv", "t_q", "t_kv", "d", "e")),
        *((name, ctypes.c_double) for name in ("scale", "dropout_p")),
        *((name, ctypes.c_int32) for name in ("dtype", "causal", "window", "reserved")),
        *((name, ctypes.c_int64) for name in ("window_left", "window_right")),
    )


class Arrays(ctypes.Structure):
    """PowerSdpaArrays; what is not set is absent."""

    _fields_ = tuple(
        (name, library.Array)
        for name in "q k v bias mask seed out lse dout dq dk dv dbias residual".split()
    )  # fmt: skip


def supports(call: SdpaCall, device: str) -> str | None:
    """None, or why the kernels cannot serve `call`: the argument, and what would work."""
    if not device.startswith("cuda"):
        return f"device {device}: the kernels run on a Hopper GPU; move the arrays there"
    if call.dtype not in ("bfloat16", "float16"):
        return f"dtype {call.dtype}: the kernels take bfloat16 and float16"
    for name, size in (("d", call.d), ("e", call.e)):
        if not 8 <= size <= LARGEST_HEAD or size % 8:
            return f"head size {name}={size}: the kernels take multiples of 8 up to {LARGEST_HEAD}"
    if call.h_q == 0 or call.h_kv == 0:
        return f"h_q={call.h_q}, h_kv={call.h_kv}: at least 1 of each is needed"
    if call.query_lengths or call.key_lengths:
        return "sequence lengths are not served; a mask says the same"
    if call.bias_grad and call.b * call.h_q > 65535:
        return f"b·h_q={call.b * call.h_q}: the kernel of the mask's gradient takes at most 65535 heads in all"
    return library.missing()


def forward(
    call: SdpaCall, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, seed: Tensor | None,
    residual: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """out `[b, h_q, t, e]` in the dtype of v, stored `[b, t, h_q, e]`, every row's log-sum-exp `[b, h_q, t]` in float32, and,
    if asked for, what rounding out left over, stored like out.

    Arrays that the copy engine cannot address (a last axis that is not contiguous, strides that are not multiples of 16 bytes)
    are copied once.
    """

    def rows() -> Tensor:
        return torch.empty(call.b, call.t, call.h_q, call.e, dtype=v.dtype, device=v.device).transpose(1, 2)

    out, rest = rows(), rows() if residual else None
    lse = torch.empty(call.b, call.h_q, call.t, dtype=torch.float32, device=q.device)
    arrays = {"q": _tileable(q), "k": _tileable(k), "v": _tileable(v), "out": out, "lse": lse, "residual": rest}
    _run("sdpa_forward", call, arrays | {"bias": bias, "mask": mask, "seed": seed})
    return out, lse, rest


def backward(
    call: SdpaCall, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, seed: Tensor | None,
    out: Tensor, lse: Tensor, dout: Tensor, residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and, if `call.bias_grad`, of bias, in the dtypes of those arguments.

    Every sum has one order: two runs give equal bits.
    """
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dbias = torch.zeros(bias.shape, dtype=bias.dtype, device=q.device) if bias is not None and call.bias_grad else None
    arrays = {"q": _tileable(q), "k": _tileable(k), "v": _tileable(v), "out": _tileable(out), "dout": _tileable(dout)}
    arrays |= {"residual": None if residual is None else _tileable(residual), "lse": lse}
    arrays |= {"bias": bias, "mask": mask, "seed": seed}
    _run("sdpa_backward", call, arrays | {"dq": dq, "dk": dk, "dv": dv, "dbias": dbias})
    return dq, dk, dv, dbias


def _run(operation: str, call: SdpaCall, arrays: Mapping[str, Tensor | None]) -> None:
    """Run `operation` on the current stream of q's device."""
    left, right = call.window or (0, 0)
    described = {name: _describe(name, x) for name, x in arrays.items() if x is not None}
    shape = Shape(
        call.b, call.h_q, call.h_kv, call.t, call.s, call.d, call.e, call.scale, call.dropout_p,
        described["q"].dtype, call.causal, call.window is not None, 0, left, right,
    )  # fmt: skip
    library.run_described(operation, shape, Arrays(**described), arrays["q"].device)


def _describe(name: str, x: Tensor) -> library.Array:
    """A tensor as a PowerArray; axes of size 1 of a mask or bias get stride 0, which is how the interface says broadcast."""
    array = library.describe(x)
    if name in ("bias", "mask", "dbias"):
        for axis, size in enumerate(x.shape):
            if size == 1:
                array.stride[axis] = 0
    return array


def _tileable(x: Tensor) -> Tensor:
    """`x`, or a contiguous copy if the copy engine cannot address it."""
    if x.numel() == 0:
        return x
    strides = (stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1)
    usable = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride > 0 and stride % 8 == 0 for stride in strides)
    return x if usable else x.contiguous()
