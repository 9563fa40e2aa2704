"""Wrong calls: each raises before any work, with the documented type and a text that names the argument, alike in both."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from bridge import twins

B, T, HQ, HKV, D, E = 2, 6, 4, 2, 16, 8



def call(function: str = "power_attention", **changes: Any) -> tuple[str, dict[str, Any]]:
    return function, changes


def zeros(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


STATE = (zeros(B, HKV, 192, E), zeros(B, HKV, 192))

# name → (call, type of the error, what its text must contain)
WRONG: dict[str, tuple[tuple[str, dict[str, Any]], type[Exception], str]] = {
    "q_axes": (call(q=zeros(B, T, D)), ValueError, "q: expected 4 axes [b t h_q d], got shape [2, 6, 16]"),
    "k_axes": (call(k=zeros(B, T, HKV, D, 1)), ValueError, "k: expected 4 axes"),
    "v_axes": (call(v=zeros(T, E)), ValueError, "v: expected 4 axes"),
    "q_list": (call(q=[1.0]), TypeError, "q: expected an array [b t h_q d], got list"),
    "k_none": (call(k=None), TypeError, "k: expected an array [b t h_kv d], got NoneType"),
    "v_number": (call(v=1.0), TypeError, "v: expected an array [b t h_kv e], got float"),
    "q_integer": (call(q=zeros(B, T, HQ, D, dtype="int32")), TypeError, "q: dtype int32 is not one of float16, bfloat16"),
    "k_boolean": (call(k=zeros(B, T, HKV, D, dtype="bool")), TypeError, "k: dtype bool is not one of"),
    "v_complex": (call(v=zeros(B, T, HKV, E, dtype="complex64")), TypeError, "v: dtype complex64 is not one of"),
    "q_no_head_size": (call(q=zeros(B, T, HQ, 0), k=zeros(B, T, HKV, 0)), ValueError, "q: head size d=0, expected at least 1"),
    "heads_not_multiple": (call(q=zeros(B, T, 3, D)), ValueError, "h_q=3 query heads are not a multiple of h_kv=2"),
    "no_kv_heads": (call(k=zeros(B, T, 0, D), v=zeros(B, T, 0, E)), ValueError, "not a multiple of h_kv=0"),
    "k_length": (call(k=zeros(B, 5, HKV, D)), ValueError, "k: length 5 differs from q's length 6; only causal=False"),
    "k_batch": (call(k=zeros(1, T, HKV, D)), ValueError, "k: expected shape [2, 6, 2, 16]"),
    "k_head_size": (call(k=zeros(B, T, HKV, 8)), ValueError, "k: expected shape [2, 6, 2, 16]"),
    "v_length": (call(v=zeros(B, 5, HKV, E)), ValueError, "v: expected shape [2, 6, 2, 8]"),
    "v_heads": (call(v=zeros(B, T, HQ, E)), ValueError, "v: expected shape [2, 6, 2, 8]"),
    "v_batch": (call(v=zeros(3, T, HKV, E)), ValueError, "v: expected shape [2, 6, 2, 8]"),
    "v_length_not_causal": (call(causal=False, log_g=None, v=zeros(B, 9, HKV, E)), ValueError, "v: expected shape"),
    "gate_heads": (call(log_g=zeros(B, T, HQ)), ValueError, "log_g: expected shape [2, 6, 2]"),
    "gate_axes": (call(log_g=zeros(B, T)), ValueError, "log_g: expected 3 axes"),
    "gate_length": (call(log_g=zeros(B, 5, HKV)), ValueError, "log_g: expected shape [2, 6, 2]"),
    "gate_half": (call(log_g=zeros(B, T, HKV, dtype="float16")), TypeError, "log_g: dtype float16 is not one of float32"),
    "gate_number": (call(log_g=-0.1), TypeError, "log_g: expected an array [b t h_kv], got float"),
    "gate_not_causal": (call(causal=False), ValueError, "log_g: gates have no meaning with causal=False"),
    "deg_zero": (call(deg=0), ValueError, "deg=0: expected an integer >= 1"),
    "deg_negative": (call(deg=-2), ValueError, "deg=-2: expected an integer >= 1"),
    "deg_float": (call(deg=2.0), TypeError, "deg=2.0: expected an integer, got float"),
    "deg_boolean": (call(deg=True), TypeError, "deg=True: expected an integer, got bool"),
    "deg_text": (call(deg="2"), TypeError, "deg='2': expected an integer, got str"),
    "deg_odd": (call(deg=3), ValueError, "deg=3: normalize=True needs an even degree"),
    "deg_one": (call(deg=1), ValueError, "deg=1: normalize=True needs an even degree"),
    "deg_chunked": (call(deg=6, form="chunked"), ValueError, "deg=6: a state is defined for deg in (1, 2, 3, 4)"),
    "deg_recurrent": (call(deg=5, form="recurrent", normalize=False), ValueError, "deg=5: a state is defined"),
    "deg_state": (call(deg=6, return_state=True), ValueError, "deg=6: a state is defined"),
    "head_size_chunked": (
        call(q=zeros(B, T, HQ, 13), k=zeros(B, T, HKV, 13), form="chunked"), ValueError,
        "head size d=13: deg=2 needs a multiple of 8, nearest usable: 8 or 16",
    ),
    "head_size_small": (
        call(q=zeros(B, T, HQ, 3), k=zeros(B, T, HKV, 3), form="recurrent"), ValueError, "nearest usable: 8",
    ),
    "head_size_state": (
        call(q=zeros(B, T, HQ, 6), k=zeros(B, T, HKV, 6), deg=3, normalize=False, return_state=True), ValueError,
        "head size d=6: deg=3 needs a multiple of 4, nearest usable: 4 or 8",
    ),
    "scale_nan": (call(scale=float("nan")), ValueError, "scale=nan: expected a finite number"),
    "scale_infinite": (call(scale=float("inf")), ValueError, "scale=inf: expected a finite number"),
    "scale_text": (call(scale="1"), TypeError, "scale='1': expected a real number or None, got str"),
    "scale_complex": (call(scale=1j), TypeError, "scale=1j: expected a real number or None, got complex"),
    "scale_boolean": (call(scale=True), TypeError, "scale=True: expected a real number or None, got bool"),
    "causal_number": (call(causal=1), TypeError, "causal=1: expected True or False, got int"),
    "causal_none": (call(causal=None), TypeError, "causal=None: expected True or False"),
    "normalize_text": (call(normalize="yes"), TypeError, "normalize='yes': expected True or False, got str"),
    "return_state_number": (call(return_state=0), TypeError, "return_state=0: expected True or False, got int"),
    "form_unknown": (
        call(form="linear"), ValueError, "form='linear': expected one of 'attention', 'chunked', 'recurrent', 'auto'",
    ),
    "form_none": (call(form=None), ValueError, "form=None: expected one of"),
    "chunk_zero": (call(chunk_size=0), ValueError, "chunk_size=0: expected an integer >= 1 or None"),
    "chunk_negative": (call(chunk_size=-64), ValueError, "chunk_size=-64: expected an integer >= 1"),
    "chunk_float": (call(chunk_size=64.0), TypeError, "chunk_size=64.0: expected an integer or None, got float"),
    "chunk_boolean": (call(chunk_size=True), TypeError, "chunk_size=True: expected an integer or None, got bool"),
    "state_array": (call(initial_state=zeros(2)), TypeError, "initial_state: expected a PowerState (s, z) or None, got"),
    "state_triple": (call(initial_state=(*STATE, STATE[1])), TypeError, "initial_state: expected a PowerState (s, z)"),
    "state_rows": (
        call(initial_state=(zeros(B, HKV, 136, E), zeros(B, HKV, 136))), ValueError,
        "initial_state.s: expected shape [2, 2, 192, 8]",
    ),
    "state_heads": (
        call(initial_state=(zeros(B, HQ, 192, E), zeros(B, HQ, 192))), ValueError, "initial_state.s: expected shape",
    ),
    "state_z": (call(initial_state=(STATE[0], zeros(B, HKV, 192, 1))), ValueError, "initial_state.z: expected 3 axes"),
    "state_z_rows": (call(initial_state=(STATE[0], zeros(B, HKV, 191))), ValueError, "initial_state.z: expected shape"),
    "state_half": (
        call(initial_state=(STATE[0].astype("float16"), STATE[1])), TypeError, "initial_state.s: dtype float16 is not one of",
    ),
    "state_not_causal": (
        call(causal=False, log_g=None, initial_state=STATE), ValueError, "initial_state: has no meaning with causal=False",
    ),
    "state_other_degree": (
        call(initial_state=STATE, deg=4), ValueError,
        "initial_state.s: expected shape [2, 2, 5280, 8] ([b h_kv D e], D for d=16, deg=4)",
    ),
    "implementation_unknown": (call(implementation="triton"), ValueError, "implementation='triton': expected one of"),
    "implementation_in_list": (call(implementation=["triton"]), ValueError, "implementation='triton': expected one of"),
    "implementation_number": (call(implementation=3), TypeError, "implementation=3: expected one of"),
    "implementation_number_in_list": (call(implementation=[3]), ValueError, "implementation=3: expected one of"),
    "implementation_none_of_them": (call(implementation=[]), ValueError, "implementation=(): expected one of"),
    "step_q_axes": (call("power_step", q=zeros(B, T, HQ, D)), ValueError, "q: expected 3 axes [b h_q d]"),
    "step_k_axes": (call("power_step", k=zeros(HKV, D)), ValueError, "k: expected 3 axes [b h_kv d]"),
    "step_v_axes": (call("power_step", v=zeros(B, 1, HKV, E)), ValueError, "v: expected 3 axes [b h_kv e]"),
    "step_gate_axes": (call("power_step", log_g=zeros(B, 1, HKV)), ValueError, "log_g: expected 2 axes [b h_kv]"),
    "step_deg": (call("power_step", deg=6), ValueError, "deg=6: a state is defined"),
    "step_state": (call("power_step", state="none"), TypeError, "initial_state: expected a PowerState (s, z) or None, got str"),
    "sympow_deg": (call("sympow", deg=5), ValueError, "deg=5: a state is defined"),
    "sympow_size": (call("sympow", x=zeros(3, 7)), ValueError, "head size d=7: deg=2 needs a multiple of 8"),
    "size_deg": (call("state_size", deg=0), ValueError, "deg=0: expected an integer >= 1"),
    "size_head": (
        call("state_size", d=20), ValueError, "head size d=20: deg=2 needs a multiple of 8, nearest usable: 16 or 24",
    ),
    "multiplicity_deg": (call("sympow_multiplicity", deg=7), ValueError, "deg=7: a state is defined"),
}  # fmt: skip

GOOD: dict[str, dict[str, Any]] = {
    "power_attention": {
        "q": zeros(B, T, HQ, D), "k": zeros(B, T, HKV, D), "v": zeros(B, T, HKV, E), "log_g": zeros(B, T, HKV),
    },
    "power_step": {"q": zeros(B, HQ, D), "k": zeros(B, HKV, D), "v": zeros(B, HKV, E), "log_g": zeros(B, HKV)},
    "sympow": {"x": zeros(3, 8), "deg": 2},
    "state_size": {"d": 16, "e": 8, "deg": 2},
    "sympow_multiplicity": {"d": 16, "deg": 2},
}  # fmt: skip


def provoke(twin: twins.Twin, function: str, changes: dict[str, Any]) -> Exception:
    """The exception that the wrong call raises in `twin`."""

    def convert(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(convert, x))
        return twin.array(x, "cpu") if isinstance(x, np.ndarray) else x

    arguments = {name: convert(x) for name, x in (GOOD[function] | changes).items()}
    with pytest.raises(Exception) as caught:
        getattr(importlib.import_module(twin.name), function)(**arguments)
    return caught.value


@pytest.mark.parametrize("twin", twins.present(), ids=lambda twin: twin.framework)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_call(twin, name):
    (function, changes), kind, text = WRONG[name]
    error = provoke(twin, function, changes)
    assert type(error) is kind, repr(error)
    assert text in str(error)


@pytest.mark.skipif(len(twins.present()) < 2, reason="needs both frameworks")
@pytest.mark.parametrize("name", [name for name in WRONG if not name.startswith("implementation")])
def test_same_text_in_both_twins(name):
    """Implementation names differ by design, and so do the types of arrays; nothing else does."""
    (function, changes), *_ = WRONG[name]
    ours, theirs = (str(provoke(twin, function, changes)) for twin in (twins.JAX, twins.TORCH))
    assert ours.replace("ArrayImpl", "Tensor") == theirs


@pytest.mark.parametrize("twin", twins.present(), ids=lambda twin: twin.framework)
def test_good_calls_pass(twin):
    """The unchanged arguments are right: every error above is due to its change."""
    for function, arguments in GOOD.items():
        arguments = {n: twin.array(x, "cpu") if isinstance(x, np.ndarray) else x for n, x in arguments.items()}
        getattr(importlib.import_module(twin.name), function)(**arguments)


def test_there_are_many():
    assert len(WRONG) >= 60
