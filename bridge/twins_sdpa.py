"""Scaled dot-product attention behind the interface of `bridge.twins`: the same call, each framework's own layout.

Arrays are those of `SdpaCase.make`: q `[b, t, h_q, d]`, k and v `[b, s, h_kv, ·]`, bias and mask `[b, h_q, t, s]`.
PyTorch's function wants heads before time, and results are turned back.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from bridge import cases_sdpa, twins

DIFFERENTIABLE = ("q", "k", "v", "bias")


def both_express(case: cases_sdpa.SdpaCase) -> bool:
    """Whether both packages' functions compute the same thing for `case`, without drawing random numbers.

    They differ in what a query gets that sees no key: 0 in PyTorch, the mean of all values in JAX.
    """
    sees_a_key = not case.hidden_rows and not (case.mask and case.keys < 8) and case.keys > 0
    if case.window is not None:
        sees_a_key &= min(case.window) >= 0 and case.t - case.window[0] <= case.keys
    return case.twins == cases_sdpa.TWINS and case.dropout_p == 0 and sees_a_key and not case.strided


def prepare(
    twin: twins.Twin,
    case: cases_sdpa.SdpaCase,
    arrays: Mapping[str, np.ndarray],
    implementation: str | None,
    device: str = "cpu",
) -> twins.Prepared:
    """The call that `case` describes, through the package's public function, on `arrays`."""
    return (_prepare_jax if twin.framework == "jax" else _prepare_torch)(twin, case, arrays, implementation, device)


def _prepare_jax(
    twin: twins.Twin, case: cases_sdpa.SdpaCase, arrays: Any, implementation: str | None, device: str
) -> twins.Prepared:
    jax, jax_power = importlib.import_module("jax"), importlib.import_module("jax_power")
    on_device = {name: twin.array(x, device) for name, x in arrays.items()}
    inputs = {name: on_device[name] for name in DIFFERENTIABLE if name in on_device}

    def call(inputs: dict[str, Any]) -> Any:
        return jax_power.dot_product_attention(
            inputs["q"], inputs["k"], inputs["v"], inputs.get("bias"), on_device.get("mask"),
            scale=case.scale, is_causal=case.causal, local_window_size=case.window, implementation=implementation,
        )  # fmt: skip

    def both(inputs: dict[str, Any], dy: Any) -> tuple[Any, dict[str, Any]]:
        y, pull_back = jax.vjp(call, inputs)
        return y, pull_back(dy)[0]

    forward_jit = jax.jit(call)
    compiled = functools.cache(lambda: jax.jit(both).lower(inputs, on_device["dy"]).compile())

    def forward() -> dict[str, Any]:
        return {"y": jax.block_until_ready(forward_jit(inputs))}

    def forward_backward() -> dict[str, Any]:
        y, grads = jax.block_until_ready(compiled()(inputs, on_device["dy"]))
        return {"y": y} | {f"d{name}": x for name, x in grads.items()}

    return twins.Prepared(forward, forward_backward, on_device, compiled)


def _prepare_torch(
    twin: twins.Twin, case: cases_sdpa.SdpaCase, arrays: Any, implementation: str | None, device: str
) -> twins.Prepared:
    torch, torch_power = importlib.import_module("torch"), importlib.import_module("torch_power")
    on_device = {name: twin.array(x, device) for name, x in arrays.items()}
    inputs = {name: on_device[name] for name in DIFFERENTIABLE if name in on_device}

    def call(inputs: dict[str, Any]) -> Any:
        q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
        y = torch_power.scaled_dot_product_attention(
            q, k, v, inputs.get("bias", on_device.get("mask")), is_causal=case.causal, scale=case.scale,
            enable_gqa=case.h_q != case.h_kv, local_window_size=case.window, implementation=implementation,
        )  # fmt: skip
        return y.transpose(1, 2)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def forward() -> dict[str, Any]:
        with torch.no_grad():
            y = call(inputs)
        wait()
        return {"y": y}

    def forward_backward() -> dict[str, Any]:
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        y = call(leaves)
        grads = torch.autograd.grad(y, tuple(leaves.values()), on_device["dy"])
        wait()
        return {"y": y.detach()} | {f"d{name}": x for name, x in zip(leaves, grads, strict=True)}

    return twins.Prepared(forward, forward_backward, on_device, lambda: None)
