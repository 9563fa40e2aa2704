"""The Pallas kernels of the attention form without a GPU: all lower for CUDA, and interpreted they match the float64 oracle.

`tests/mosaic_gpu_interpreted.py` says what interpreting tests, and what it does not.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bridge import cases, spec
from jax_power.mosaic_gpu import attention
from tests.mosaic_gpu_interpreted import interpreted

Case = cases.Case


def run(case: Case, arrays: dict[str, Any]) -> dict[str, Any]:
    """y and the gradients, by name, from the kernels."""
    q, k, v, dy = (jnp.asarray(arrays[name]) for name in ("q", "k", "v", "dy"))
    log_g = jnp.asarray(arrays["log_g"]) if "log_g" in arrays else None
    options = {name: getattr(case, name) for name in ("deg", "scale", "causal", "normalize")}
    call = spec.check_power(q, k, v, log_g, **options, form="attention")
    assert attention.supports(call, "cuda") is None
    y, norm, *_ = attention.forward(call, q, k, v, log_g, None, None)
    grads = attention.backward(call, q, k, v, log_g, None, None, y, norm, dy, None, None)
    results = dict(zip(("y", "dq", "dk", "dv", "dlog_g"), (y, *grads), strict=False))
    return {name: x for name, x in results.items() if x is not None}


# ---------------------------------------------------------------------------------------------------------------------
# Lowering
# ---------------------------------------------------------------------------------------------------------------------

# Every row of the tile table, with and without gates, both dtypes, all degrees, tails, groups of heads.
LOWERED = (
    ("bfloat16", Case("plain", t=512, d=64, e=64, gates=None)),
    ("bfloat16", Case("gates", t=100, h_q=4, d=64, e=64)),
    ("float16", Case("half", t=100, d=40, e=64, deg=4, gates=None)),
    ("float16", Case("wide_half_gates", t=300, d=128, e=128)),
    ("bfloat16", Case("wide", t=300, d=128, e=100, deg=4, gates=None)),
    ("bfloat16", Case("wide_value_gates", t=20, d=64, e=128, deg=1, normalize=False)),
    ("bfloat16", Case("not_causal", t=33, t_kv=300, h_q=4, d=64, e=64, deg=3, normalize=False, causal=False, gates=None)),
)


@pytest.mark.parametrize(("dtype", "case"), LOWERED, ids=lambda x: getattr(x, "name", x))
def test_lowers_for_cuda(dtype: str, case: Case) -> None:
    lowered = jax.jit(lambda x: run(case, x)).trace(case.make(dtype)).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu_v2") == 3  # forward, and two kernels backward


# ---------------------------------------------------------------------------------------------------------------------
# Interpreting
# ---------------------------------------------------------------------------------------------------------------------


INTERPRETED = (
    ("bfloat16", Case("tail", t=70, h_q=1, h_kv=1, d=64, e=64, gates=None)),
    ("bfloat16", Case("ring_runs_around", t=330, h_q=1, h_kv=1, d=128, e=128, gates=None)),
    ("bfloat16", Case("group_gates", t=140, h_q=2, h_kv=1, d=64, e=64, gates="mixed")),
    ("float16", Case("half_cross", t=10, t_kv=70, h_q=1, h_kv=1, d=64, e=64, deg=4, causal=False, gates=None, std=8.0)),
)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="JAX 0.10 interprets no plgpu.load and detects no races")
@pytest.mark.parametrize(("dtype", "case"), INTERPRETED, ids=lambda x: getattr(x, "name", x))
def test_interpreted_matches_oracle(dtype: str, case: Case) -> None:
    arrays = case.make(dtype)
    with interpreted(jnp.dtype(dtype)):
        got = run(case, arrays)
    found = cases.errors({name: np.asarray(x) for name, x in got.items()}, case.exact(arrays), case, arrays["dy"])
    cases.assert_within(found, cases.bounds(dtype, "mosaic_gpu", case), case.name)
