"""The table of named cases that tests, validation and benchmarks draw from, their bounds, and the error measure.

A case says what is computed and on which inputs; `Case.make` gives the inputs as NumPy arrays, the same bytes for both
frameworks and for the float64 oracle. Errors are relative L2 per tensor, never pooled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from bridge import oracle, spec

NUMPY_DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}

# Implementations that round to float16 or bfloat16 inside (their bounds are wider than those that round once).
FUSED = ("cuda", "cuda_ffi", "mosaic_gpu")


@dataclasses.dataclass(frozen=True)
class Case:
    """Power attention on random inputs: q, k, v normal with deviation `std`, gates by a named recipe.

    Gate recipes: None; "mild" (log_g = log σ(x + 4), about −0.02); "strong" (−50 a token); "mixed" (−50 or −0.01 at random).
    `cancelling` names the gradients whose exact value is 0 but for cancellation, or so small beside their terms that only an
    error relative to dy means anything.
    """

    name: str
    b: int = 1
    t: int = 64
    t_kv: int | None = None
    h_q: int = 2
    h_kv: int = 2
    d: int = 16
    e: int = 16
    deg: int = 2
    scale: float | None = None
    gates: str | None = "mild"
    causal: bool = True
    normalize: bool = True
    initial_state: bool = False
    return_state: bool = False
    chunk_size: int | None = None
    std: float = 1.0
    cancelling: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16", "float16")
    forms: tuple[str, ...] = spec.FORMS

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `power_attention` and of the oracle that are not arrays."""
        return {name: getattr(self, name) for name in ("deg", "scale", "causal", "normalize", "return_state")}

    def make(self, dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
        """Inputs `q k v [log_g] [s0 z0]`, upstream gradients `dy [ds dz]`: q, k, v, dy in `dtype`, the rest float32 or 64."""
        rng = np.random.default_rng([seed, *self.name.encode()])
        t_kv = self.t if self.t_kv is None else self.t_kv
        low, high = NUMPY_DTYPES[dtype], NUMPY_DTYPES["float64" if dtype == "float64" else "float32"]
        arrays = {
            "q": self.std * rng.standard_normal((self.b, self.t, self.h_q, self.d)),
            "k": self.std * rng.standard_normal((self.b, t_kv, self.h_kv, self.d)),
            "v": rng.standard_normal((self.b, t_kv, self.h_kv, self.e)),
            "dy": rng.standard_normal((self.b, self.t, self.h_q, self.e)),
        }
        arrays = {name: x.astype(low) for name, x in arrays.items()}
        if self.gates is not None:
            arrays["log_g"] = _gates(self.gates, rng, (self.b, t_kv, self.h_kv)).astype(high)
        if self.initial_state:
            # A state that some earlier tokens could have left (a random one could make a negative normaliser).
            earlier = oracle.power(
                *(rng.standard_normal((self.b, 24, self.h_kv, n)) for n in (self.d, self.d, self.e)),
                deg=self.deg, normalize=False, return_state=True,
            )  # fmt: skip
            arrays["s0"], arrays["z0"] = earlier.s.astype(high), earlier.z.astype(high)
        if self.return_state:
            rows = spec.state_rows(self.d, self.deg)
            arrays["ds"] = rng.standard_normal((self.b, self.h_kv, rows, self.e)).astype(high)
            arrays["dz"] = rng.standard_normal((self.b, self.h_kv, rows)).astype(high)
        return arrays

    def exact(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The float64 oracle's outputs and gradients on `arrays`, by name: y [s z] dq dk dv [dlog_g] [ds0 dz0]."""
        qkvg = [arrays["q"], arrays["k"], arrays["v"], arrays.get("log_g")]
        state = (arrays["s0"], arrays["z0"]) if self.initial_state else None
        options = self.options()
        want = oracle.power(*qkvg, **options, initial_state=state)._asdict()
        del options["return_state"]
        upstream = [arrays.get(name) for name in ("dy", "ds", "dz")]
        want |= oracle.power_grads(*qkvg, *upstream, **options, initial_state=state)._asdict()
        return {name: x for name, x in want.items() if x is not None}


def _gates(recipe: str, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    if recipe == "mild":
        return -np.log1p(np.exp(-(rng.standard_normal(shape) + 4.0)))
    if recipe == "strong":
        return np.full(shape, -50.0)
    if recipe == "mixed":
        return np.where(rng.random(shape) < 0.5, -50.0, -0.01)
    raise ValueError(f"gates={recipe!r}: expected 'mild', 'strong' or 'mixed'")


# What strong gates leave of a gradient with respect to q, k or a gate is the difference of two equal terms: every token sees
# itself alone, so y_i = v_i whatever q_i and k_i are.
_SEES_ITSELF = ("dq", "dk", "dlog_g")

POWER = (
    Case("plain", b=2, t=96, gates=None),
    Case("gates", b=2, t=100),
    Case("gqa", t=70, h_q=6, h_kv=2),
    Case("mqa_wide_value", t=65, h_q=4, h_kv=1, d=8, e=24),
    Case("narrow_value", t=50, d=32, e=5),
    Case("odd_length", t=131, chunk_size=32),
    Case("one_token", t=1, gates="mild", cancelling=("dq", "dk", "dlog_g")),
    Case("two_tokens", t=2),
    Case("empty", t=0),
    Case("no_batch", b=0, t=5),
    Case("chunk_longer_than_t", t=20, chunk_size=64),
    Case("chunk_of_one", t=9, chunk_size=1),
    Case("degree_1", t=60, deg=1, normalize=False),
    Case("degree_3", t=60, deg=3, normalize=False, d=12, e=8),
    Case("degree_4", t=60, deg=4, d=8, e=8),
    Case("degree_6", t=40, deg=6, forms=("attention",)),
    Case("degree_5_not_normalized", t=40, deg=5, normalize=False, forms=("attention",)),
    Case("any_head_size", t=40, d=13, e=7, forms=("attention",)),
    Case("not_normalized", t=75, normalize=False, chunk_size=16),
    Case("not_causal", t=60, causal=False, gates=None),
    Case("not_causal_cross", t=33, t_kv=70, causal=False, gates=None, h_q=4, h_kv=2),
    Case("not_causal_no_keys", t=5, t_kv=0, causal=False, gates=None),
    Case("not_causal_state", t=40, t_kv=50, causal=False, gates=None, return_state=True),
    Case("strong_decay", t=70, gates="strong", cancelling=_SEES_ITSELF),
    Case("mixed_decay", t=300, gates="mixed", chunk_size=128),
    Case("from_state", t=77, initial_state=True, chunk_size=32),
    Case("to_state", t=77, return_state=True, chunk_size=32),
    Case("state_to_state", t=45, h_q=4, h_kv=2, initial_state=True, return_state=True, chunk_size=16),
    Case("state_no_gates", t=45, gates=None, initial_state=True, return_state=True, chunk_size=16),
    Case("state_not_normalized", t=45, deg=3, d=8, normalize=False, initial_state=True, return_state=True, chunk_size=16),
    Case("state_degree_4", t=30, deg=4, d=4, e=6, initial_state=True, return_state=True, chunk_size=8),
    Case("state_empty", t=0, initial_state=True, return_state=True),
    Case("state_one_token", t=1, initial_state=True, return_state=True),
    Case("negative_scale", t=40, scale=-0.7),
    Case("negative_scale_odd", t=40, deg=3, scale=-0.7, normalize=False),
    Case("zero_scale", t=40, scale=0.0),
    Case("large_inputs", t=64, std=8.0),
    Case("head_64", t=200, h_q=2, h_kv=1, d=64, e=64, forms=("attention", "chunked")),
)  # fmt: skip

BY_NAME = {case.name: case for case in POWER}

_GRADIENTS = ("dq", "dk", "dv")
_STATE = ("s", "z", "ds0", "dz0")


def bounds(dtype: str, implementation: str, case: Case | None = None) -> dict[str, float]:
    """Relative L2 bound of every output and gradient, by name: the table of the contract's section 6.

    Gradients with respect to the initial state are held to the bound of dq, dk, dv (it is an operand of the same products).
    """
    y, grads, gate, state = _bound_row(dtype, fused=implementation in FUSED)
    if case is not None and case.gates == "mixed" and dtype == "float32":
        y = grads = gate = state = 1e-4
    return {"y": y, **dict.fromkeys(_GRADIENTS, grads), "dlog_g": gate} | {
        name: grads if name.startswith("d") else state for name in _STATE
    }


def _bound_row(dtype: str, *, fused: bool) -> tuple[float, float, float, float]:
    if dtype == "float64":
        return 1e-12, 1e-11, 1e-11, 1e-12
    if dtype == "float32":
        return 2e-6, 1e-5, 1e-5, 2e-6
    if fused:
        return (5e-4, 8e-4, 2e-3, 1e-3) if dtype == "float16" else (3.0e-3, 3.7e-3, 5.0e-3, 3e-3)
    return (3e-4, 3e-4, 1e-4, 1e-4) if dtype == "float16" else (2e-3, 2e-3, 1e-4, 1e-4)


def relative_error(got: Any, want: np.ndarray, floor: float = 0.0) -> float:
    """‖got − want‖ / max(‖want‖, floor) in float64; NaN counts as infinite, and 0 against 0 as 0."""
    got, want = np.asarray(got).astype(np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape or not np.isfinite(got).all():
        return float("inf")
    difference, size = float(np.linalg.norm(got - want)), max(float(np.linalg.norm(want)), floor)
    return difference / size if size else (0.0 if difference == 0 else float("inf"))


def errors(got: Mapping[str, Any], want: Mapping[str, np.ndarray], case: Case, dy: np.ndarray) -> dict[str, float]:
    """Relative L2 error of every tensor in `want`. Those that the case calls cancelling are measured against ‖dy‖."""
    size = float(np.linalg.norm(np.asarray(dy).astype(np.float64)))
    return {name: relative_error(got[name], x, size if name in case.cancelling else 0.0) for name, x in want.items()}


def assert_within(found: Mapping[str, float], allowed: Mapping[str, float], what: str = "") -> None:
    """Raise AssertionError naming every tensor whose error exceeds its bound, the worst first."""
    worst = sorted(((error / allowed[name], name, error) for name, error in found.items()), reverse=True)
    breaches = [f"{name}: {error:.3g} > {allowed[name]:.3g} ({ratio:.2f}x)" for ratio, name, error in worst if not ratio <= 1]
    if breaches:
        raise AssertionError(f"{what}: relative L2 error over its bound: " + "; ".join(breaches))
