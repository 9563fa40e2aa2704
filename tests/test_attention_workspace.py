"""How much scratch memory the attention form's kernels ask for; needs the compiled library, but no GPU."""

from __future__ import annotations

import ctypes

import pytest

pytest.importorskip("torch")

from torch_power import _library
from torch_power.cuda.library import Shape


def backward_bytes(*, t: int = 16384, h: int = 16, d: int = 128, gates: bool = False, deg: int = 2, causal: bool = True) -> int:
    path = _library.kernels_path()
    library = ctypes.CDLL(str(path)) if path.exists() else None
    if not hasattr(library, "power_attention_quadratic_backward_workspace_sm90"):
        pytest.skip("the library has no kernels for Hopper")
    function = library.power_attention_quadratic_backward_workspace_sm90
    function.restype, function.argtypes = ctypes.c_int64, (ctypes.c_void_p, ctypes.c_void_p)
    shape = Shape(1, t, t, h, h, d, d, 1, 1.0, deg, 0, 2, causal, True, False, gates)
    return function(ctypes.addressof(shape), None)


@pytest.mark.parametrize("d", [64, 128])
def test_sums_are_asked_for_where_they_are_used(d: int) -> None:
    """Four bytes a number of dq in the pass that adds it up in device memory, and not with gates or in other kernels."""
    sums, records = 4 * 16384 * 16 * d, 8 * 16384 * 16
    assert sums <= backward_bytes(d=d) <= sums + records + 2**20
    for others in ({"gates": True}, {"deg": 4}, {"causal": False}, {"t": 1024}):
        t = others.get("t", 16384)
        assert backward_bytes(d=d, **others) < 64 * t * 16, others
