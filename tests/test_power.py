"""Power attention: every case × form × implementation × dtype of both twins against the float64 oracle, and their agreement."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from bridge import cases, twins

# Not compiled as a whole: then programs are shared by all dtypes that are computed in float32, and by calls alike.
JAX = twins.JaxTwin(jit=False)
TWINS_HERE = twins.present(JAX)

SERVED = [(twin, name) for twin in TWINS_HERE for name in twin.implementations("power_attention")]


@functools.cache
def expected(case: cases.Case, dtype: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    arrays = case.make(dtype)
    return arrays, case.exact(arrays)


def compute(twin: twins.Twin, case: cases.Case, arrays, dtype: str, implementation: str | None, form: str):
    options = case.options() | {"form": form, "chunk_size": case.chunk_size}
    with twin.scope(dtype):
        results = twin.prepare_power(arrays, options, implementation).forward_backward()
        return {name: twin.numpy(x) for name, x in results.items()}


@pytest.mark.parametrize(("twin", "implementation"), SERVED, ids=lambda x: x if isinstance(x, str) else x.framework)
@pytest.mark.parametrize(
    ("case", "dtype", "form"),
    [pytest.param(case, dtype, form, id=f"{case.name}-{dtype}-{form}")
     for case in cases.POWER for dtype in case.dtypes for form in case.forms],
)  # fmt: skip
def test_matches_oracle(twin, implementation, case, dtype, form):
    arrays, want = expected(case, dtype)
    try:
        got = compute(twin, case, arrays, dtype, implementation, form)
    except NotImplementedError as reason:
        pytest.skip(f"{reason}")
    assert got["y"].dtype == arrays["v"].dtype
    assert got.keys() == want.keys()
    found = cases.errors(got, want, case, arrays["dy"])
    cases.assert_within(found, cases.bounds(dtype, implementation, case), f"{case.name} {dtype} {form}")


@pytest.mark.skipif(len(TWINS_HERE) < 2, reason="needs both frameworks")
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["gates", "gqa", "mixed_decay", "state_to_state", "not_causal_cross", "degree_4"])
def test_twins_agree(name, dtype):
    """On the same bytes, JAX and PyTorch differ by less than the bound on their distance to the oracle."""
    case = cases.BY_NAME[name]
    arrays, want = expected(case, dtype)
    ours, theirs = (compute(twin, case, arrays, dtype, None, "auto") for twin in (JAX, twins.TORCH))
    size = float(np.linalg.norm(arrays["dy"].astype(np.float64)))
    bounds = cases.bounds(dtype, "eager", case)
    difference = {
        key: cases.relative_error(ours[key], theirs[key].astype(np.float64), size if key in case.cancelling else 0.0)
        for key in want
    }
    cases.assert_within(difference, bounds, f"{name} {dtype}")


@pytest.mark.parametrize("twin", TWINS_HERE, ids=lambda twin: twin.framework)
def test_repeats_bit_for_bit(twin):
    case = cases.BY_NAME["state_to_state"]
    arrays = case.make("float32")
    first, second = (compute(twin, case, arrays, "float32", None, "chunked") for _ in range(2))
    for name, x in first.items():
        np.testing.assert_array_equal(x, second[name], err_msg=name)


@pytest.mark.parametrize("twin", TWINS_HERE, ids=lambda twin: twin.framework)
@pytest.mark.parametrize("form", ["attention", "chunked"])
def test_large_half_inputs_stay_finite(twin, form):
    """float16 with q and k of deviation 8: scores reach 1000, their squares overflow float16 but not the sum."""
    case = cases.Case("large_half", t=1024, h_q=1, h_kv=1, d=32, e=16, std=8.0)
    arrays = case.make("float16")
    got = compute(twin, case, arrays, "float16", None, form)
    found = cases.errors(got, case.exact(arrays), case, arrays["dy"])
    cases.assert_within(found, cases.bounds("float16", "eager"))
