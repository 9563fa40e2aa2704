"""Checks the attention-form kernels against a float64 sum on the same GPU: python attention_check.py [--small] [--repeat N].

The repository's root is the working directory; POWER_KERNELS names a library whose kernels come before those built there.
Every output is taken from memory that held NaN before. Prints one line a case and exits 1 if any is over its bound.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from typing import Any

import torch

sys.path.insert(0, ".")
from bridge import cases, spec
from torch_power.cuda import attention


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call: sizes, options and the deviation of q and k."""

    name: str
    b: int = 1
    t: int = 256
    t_kv: int | None = None
    h_q: int = 2
    h_kv: int = 2
    d: int = 64
    e: int = 64
    deg: int = 2
    gates: str | None = None
    causal: bool = True
    normalize: bool = True
    scale: float | None = None
    std: float = 1.0
    dtype: str = "bfloat16"
    gate_bound: float | None = None


SMALL = (
    Shape("plain", t=192),
    Shape("odd", t=131, b=2),
    Shape("gates", t=200, gates="mild"),
    Shape("d128", t=200, d=128, e=128, gates="mild"),
    Shape("f16 deg 4", t=150, deg=4, dtype="float16"),
    Shape("cross", t=70, t_kv=150, causal=False, h_q=4),
    Shape("d256 short", t=150, d=256, e=256, gates="mild"),
)
WIDE = (  # one slot of everything, one stage of keys, two warpgroups for the same keys in the gradient of k and v
    Shape("d256", t=500, d=256, e=256),
    Shape("d256 one token", t=1, d=256, e=256),
    Shape("d256 gates gqa", t=1000, d=256, e=256, b=2, h_q=4, h_kv=2, gates="mild"),
    Shape("d256 mixed", t=700, d=256, e=256, gates="mixed"),
    Shape("d256 strong", t=300, d=256, e=256, gates="strong"),
    Shape("d192 e136", t=333, d=192, e=136),
    Shape("d64 e256 deg 4", t=300, d=64, e=256, deg=4, gates="mild"),
    Shape("d256 deg 3", t=300, d=256, e=256, deg=3, normalize=False, scale=-0.05),
    Shape("d256 deg 1", t=300, d=256, e=256, deg=1, normalize=False, gates="mild"),
    Shape("d256 not causal", t=300, t_kv=777, causal=False, d=256, e=256, h_q=4, h_kv=2),
    Shape("d256 more queries than keys", t=500, t_kv=100, causal=False, d=256, e=200),
    Shape("d256 no keys", t=50, t_kv=0, causal=False, d=256, e=256),
    Shape("d256 no queries", t=0, t_kv=50, causal=False, d=256, e=256),
    Shape("d256 2048", t=2048, d=256, e=256, h_q=3, h_kv=3),
    Shape("f16 d256", t=600, d=256, e=256, dtype="float16", gates="mild"),
    Shape("f16 d256 large", t=4096, d=256, e=256, dtype="float16", std=8.0, h_q=1, h_kv=1),
    Shape("f16 d256 not causal", t=300, t_kv=500, d=256, e=256, dtype="float16", causal=False, h_q=4, h_kv=2),
)
ONE_PASS = (  # bfloat16, degree 2, causal, no gates: the backward pass in one pass, from t = 8192, heads over 64 from 4096
    Shape("one pass d64", t=8192),
    Shape("one pass d64 gqa odd", t=8229, h_q=2, h_kv=1),
    Shape("one pass d64 odd tiles", t=8257, d=40, e=24, h_q=1, h_kv=1),
    Shape("one pass d64 not normalized", t=8193, h_q=1, h_kv=1, normalize=False, scale=-0.3),
    Shape("one pass d64 zero scale", t=8192, h_q=1, h_kv=1, scale=0.0),
    Shape("one pass d64 tiny q", t=8192, h_q=1, h_kv=1, std=1e-15),
    Shape("one pass d64 huge q", t=8192, h_q=1, h_kv=1, std=1e6),
    Shape("one pass", t=4096, d=128, e=128, h_q=5, h_kv=5),
    Shape("one pass, one head", t=4096, d=128, e=128, h_q=1, h_kv=1),
    Shape("one pass gqa odd", t=4133, d=128, e=128, b=2, h_q=4, h_kv=2),
    Shape("one pass odd tiles", t=4161, d=96, e=72, h_q=3, h_kv=3),
    Shape("one pass not normalized", t=4097, d=128, e=128, normalize=False, scale=-0.3),
    Shape("one pass zero scale", t=4096, d=128, e=128, scale=0.0),
    Shape("one pass tiny q", t=4096, d=128, e=128, std=1e-15),
    Shape("one pass huge q", t=4096, d=128, e=128, std=1e6),
    Shape("one pass large", t=4096, d=128, e=128, std=8.0),
    Shape("one pass 8192", t=8192, d=128, e=128, h_q=3, h_kv=3),
)
FULL = (
    *SMALL,
    *ONE_PASS,
    Shape("one token", t=1),
    Shape("two tokens", t=2, gates="mild"),
    Shape("64", t=64),
    Shape("65", t=65, gates="mild"),
    Shape("128", t=128, d=128, e=128),
    Shape("511", t=511),
    Shape("1000 gates", t=1000, gates="mild", b=2, h_q=4, h_kv=2),
    Shape("1000 d128", t=1000, d=128, e=128, b=2, h_q=4, h_kv=1),
    Shape("2048", t=2048, h_q=3, h_kv=3),
    Shape("4096 d128 gates", t=4096, d=128, e=128, h_q=1, h_kv=1, gates="mild"),
    Shape("gqa", t=333, h_q=6, h_kv=2, gates="mild"),
    Shape("d32 e96", t=300, d=32, e=96),
    Shape("d40 e24", t=300, d=40, e=24, gates="mild"),
    Shape("d8 e128", t=300, d=8, e=128),
    Shape("d96", t=300, d=96, e=96, gates="mild"),
    Shape("deg 4", t=500, deg=4, gates="mild"),
    Shape("deg 4 d128", t=500, deg=4, d=128, e=128),
    Shape("deg 3", t=300, deg=3, normalize=False, gates="mild", scale=-0.3),
    Shape("deg 1", t=300, deg=1, normalize=False, gates="mild"),
    Shape("not normalized", t=300, normalize=False),
    Shape("not normalized d128 gates", t=300, normalize=False, d=128, e=128, gates="mild"),
    Shape("not causal", t=300, causal=False),
    Shape("not causal d128", t=300, t_kv=777, causal=False, d=128, e=128, h_q=4, h_kv=2),
    Shape("no keys", t=50, t_kv=0, causal=False),
    Shape("no queries", t=0, t_kv=50, causal=False),
    Shape("zero scale", t=100, scale=0.0),
    Shape("tiny q", t=200, std=1e-15),
    Shape("huge q", t=200, std=1e6),
    Shape("strong", t=300, gates="strong"),
    Shape("mixed", t=1000, gates="mixed"),
    Shape("mixed d128", t=1000, gates="mixed", d=128, e=128),
    Shape("f16", t=600, dtype="float16", gates="mild"),
    Shape("f16 d128", t=600, dtype="float16", d=128, e=128),
    Shape("f16 mixed", t=600, dtype="float16", gates="mixed"),
    Shape("f16 large", t=4096, dtype="float16", std=8.0),
    Shape("f16 large d128", t=4096, dtype="float16", std=8.0, d=128, e=128, h_q=1, h_kv=1),
    Shape("f16 large deg 4", t=4096, dtype="float16", std=8.0, deg=4, gates="mild"),
    Shape("f16 not normalized", t=300, dtype="float16", normalize=False, std=0.5),
    Shape("f16 deg 3", t=300, dtype="float16", deg=3, normalize=False, std=0.7),
    Shape("f16 gqa cross", t=300, t_kv=500, dtype="float16", causal=False, h_q=4, h_kv=2),
    Shape("many heads", b=4, t=130, h_q=64, h_kv=64),
    *WIDE,
)


def inputs(shape: Shape, seed: int) -> dict[str, torch.Tensor]:
    """q, k, v, dy in the case's dtype and log_g in float32, random."""
    generator = torch.Generator("cuda").manual_seed(seed)
    dtype, t_kv = getattr(torch, shape.dtype), shape.t if shape.t_kv is None else shape.t_kv

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device="cuda")

    arrays = {
        "q": (shape.std * normal(shape.b, shape.t, shape.h_q, shape.d)).to(dtype),
        "k": (min(shape.std, 1e3) * normal(shape.b, t_kv, shape.h_kv, shape.d)).to(dtype),
        "v": normal(shape.b, t_kv, shape.h_kv, shape.e).to(dtype),
        "dy": normal(shape.b, shape.t, shape.h_q, shape.e).to(dtype),
    }
    if shape.std < 1e-3:
        arrays["k"] = normal(shape.b, t_kv, shape.h_kv, shape.d).to(dtype)
    x = normal(shape.b, t_kv, shape.h_kv)
    if shape.gates == "mild":
        arrays["log_g"] = torch.nn.functional.logsigmoid(x + 4)
    elif shape.gates == "strong":
        arrays["log_g"] = torch.full_like(x, -50.0)
    elif shape.gates == "mixed":
        arrays["log_g"] = torch.where(x < 0, -50.0, -0.01)
    return arrays


def exact(shape: Shape, arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """y and the gradients, by the O(t²) sum in float64 and automatic differentiation."""
    x = {name: value.double().requires_grad_(name != "dy") for name, value in arrays.items()}
    group, scale = shape.h_q // shape.h_kv, shape.d**-0.5 if shape.scale is None else shape.scale
    score = scale * torch.einsum("bihd,bjhd->bhij", x["q"], x["k"].repeat_interleave(group, 2))
    weight = score**shape.deg
    if "log_g" in x:
        total = x["log_g"].cumsum(1).movedim(1, 2).repeat_interleave(group, 1)
        exponent = total[..., :, None] - total[..., None, :]
        above = torch.ones_like(exponent, dtype=torch.bool).triu(1)
        weight = weight * exponent.masked_fill(above, -math.inf).exp()
    if shape.causal:
        weight = weight.tril()
    y = torch.einsum("bhij,bjhe->bihe", weight, x["v"].repeat_interleave(group, 2))
    if shape.normalize:
        norm = weight.sum(-1).movedim(1, 2)[..., None]
        y = torch.where(norm == 0, 0.0, y / torch.where(norm == 0, 1.0, norm))
    names = [name for name in x if name != "dy"]
    grads = torch.autograd.grad(y, [x[name] for name in names], x["dy"], allow_unused=True)
    found = {"d" + name: g if g is not None else torch.zeros_like(x[name]) for name, g in zip(names, grads, strict=True)}
    return {"y": y.detach(), **found}


def poison() -> None:
    """Leave NaN in what the allocator hands out next."""
    blocks = [torch.full((n,), float("nan"), device="cuda") for n in (1 << 26, *[1 << 21] * 8, *[1 << 17] * 64)]
    del blocks


def run(shape: Shape, arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Forward and backward through the raw interface."""
    call = spec.check_power(
        arrays["q"], arrays["k"], arrays["v"], arrays.get("log_g"), deg=shape.deg, scale=shape.scale, causal=shape.causal,
        normalize=shape.normalize, form="attention",
    )  # fmt: skip
    reason = attention.supports(call, "cuda")
    assert reason is None, reason
    x = (arrays["q"], arrays["k"], arrays["v"], arrays.get("log_g"), None, None)
    poison()
    y, norm, *_ = attention.forward(call, *x)
    poison()
    dq, dk, dv, dlog_g, *_ = attention.backward(call, *x, y, norm, arrays["dy"], None, None)
    return {"y": y, "dq": dq, "dk": dk, "dv": dv} | ({} if dlog_g is None else {"dlog_g": dlog_g})


def check(shape: Shape, seed: int = 0) -> bool:
    """Run one case, print its errors, and say whether all are within their bounds."""
    arrays = inputs(shape, seed)
    got, want = run(shape, arrays), exact(shape, arrays)
    torch.cuda.synchronize()
    bounds, found = cases.bounds(shape.dtype, "cuda"), {}
    dy = arrays["dy"].double().norm().item()
    for name, x in want.items():
        error, size = (got[name].double() - x).norm().item(), x.norm().item()
        if shape.t == 1 or (shape.gates == "strong" and name in ("dq", "dk", "dlog_g")):  # 0 but for cancellation
            size = max(size, dy)
        found[name] = error / size if size else (0.0 if error == 0 else math.inf)
    bad = [name for name, error in found.items() if not error <= bounds[name]]
    errors = (f"{name} {error:.2e}" for name, error in found.items())
    print(f"{'FAIL' if bad else 'ok  '} {shape.name:28s} {shape.dtype:9s}", *errors, flush=True)
    return not bad


def repeat(shape: Shape, times: int) -> bool:
    """Whether `times` runs give equal bits."""
    arrays = inputs(shape, 1)
    first = run(shape, arrays)
    same = True
    for _ in range(times):
        again: dict[str, Any] = run(shape, arrays)
        same = same and all(torch.equal(first[name], again[name]) for name in first)
    print(f"{'ok  ' if same else 'FAIL'} {shape.name}: {times} runs bit-equal: {same}", flush=True)
    return same


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true", help="a few small cases, for compute-sanitizer")
    parser.add_argument("--repeat", type=int, default=0, help="also run two cases this often and compare bits")
    options = parser.parse_args()
    ok = True
    for shape in SMALL if options.small else FULL:
        ok = check(shape) and ok
    if options.repeat:
        ok = repeat(Shape("repeat", t=1000, h_q=4, h_kv=2, gates="mild"), options.repeat) and ok
        ok = repeat(Shape("repeat d128", t=777, d=128, e=128, b=2), options.repeat) and ok
        ok = repeat(Shape("repeat one pass", t=4224, d=128, e=128, h_q=8, h_kv=4), options.repeat) and ok
        ok = repeat(Shape("repeat d256", t=777, d=256, e=256, b=2), options.repeat) and ok
    print("all within bounds" if ok else "SOME FAILED")
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
