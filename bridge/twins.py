"""Both packages behind one small interface, so that tests, validation and benchmarks run the same call in either.

Importing this module imports neither framework; using a twin imports its own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

ARGUMENTS = ("q", "k", "v", "log_g", "s0", "z0")
UPSTREAM = ("dy", "ds", "dz")


class Prepared(NamedTuple):
    """A call on inputs that are already on the device. Both functions wait for their result.

    Fields:
      forward: outputs by name: y [s z].
      forward_backward: outputs, and gradients dq dk dv [dlog_g] [ds0 dz0].
      arrays: the inputs, by name.
      compile: makes `forward_backward` ready without running it, so that its first call can be timed.
    """

    forward: Callable[[], dict[str, Any]]
    forward_backward: Callable[[], dict[str, Any]]
    arrays: dict[str, Any]
    compile: Callable[[], Any]


class Twin(Protocol):
    """What JAX and PyTorch have to offer to whoever compares them."""

    name: str
    framework: str

    def implementations(self, operation: str) -> tuple[str, ...]:
        """Names in the operation's table, best first."""
        ...

    def scope(self, dtype: str) -> contextlib.AbstractContextManager[Any]:
        """Where arrays of `dtype` may be made and used (64-bit ones need leave in JAX)."""
        ...

    def array(self, x: np.ndarray, device: str) -> Any:
        """A NumPy array, bfloat16 included, as the framework's own on `device` ("cpu" or "cuda")."""
        ...

    def numpy(self, x: Any) -> np.ndarray:
        """The framework's array as NumPy's, in the same dtype."""
        ...

    def prepare_power(
        self,
        arrays: Mapping[str, np.ndarray],
        options: Mapping[str, Any],
        implementation: str | None,
        device: str = "cpu",
    ) -> Prepared:
        """`power_attention` on `arrays` (names of `Case.make`) with keyword arguments `options`."""
        ...


class JaxTwin:
    """`jit`: compile the whole call, as benchmarks need; without, only the parts that the package itself compiles."""

    name = "jax_power"
    framework = "jax"

    def __init__(self, jit: bool = True):
        self.jit = jit

    def implementations(self, operation: str) -> tuple[str, ...]:
        choice = importlib.import_module("jax_power.choice")
        return choice.CHOICE.names(operation)

    def scope(self, dtype: str) -> contextlib.AbstractContextManager[Any]:
        jax = importlib.import_module("jax")
        return jax.enable_x64(dtype == "float64")

    def array(self, x: np.ndarray, device: str) -> Any:
        jax = importlib.import_module("jax")
        return jax.device_put(x, jax.devices(device)[0])

    def numpy(self, x: Any) -> np.ndarray:
        return np.asarray(x)

    def prepare_power(
        self,
        arrays: Mapping[str, np.ndarray],
        options: Mapping[str, Any],
        implementation: str | None,
        device: str = "cpu",
    ) -> Prepared:
        jax, jax_power = importlib.import_module("jax"), importlib.import_module("jax_power")
        on_device = {name: self.array(x, device) for name, x in arrays.items()}
        inputs = {name: on_device[name] for name in ARGUMENTS if name in on_device}
        upstream = tuple(on_device[name] for name in UPSTREAM if name in on_device)

        def call(inputs: dict[str, Any]) -> tuple[Any, ...]:
            state = jax_power.PowerState(inputs["s0"], inputs["z0"]) if "s0" in inputs else None
            result = jax_power.power_attention(
                inputs["q"], inputs["k"], inputs["v"], inputs.get("log_g"), initial_state=state,
                implementation=implementation, **options,
            )  # fmt: skip
            return (result[0], *result[1]) if options.get("return_state") else (result,)

        def both(inputs: dict[str, Any], upstream: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            outputs, pull_back = jax.vjp(call, inputs)
            return outputs, pull_back(upstream)[0]

        run_forward = jax.jit(call) if self.jit else call
        compiled = functools.cache(lambda: jax.jit(both).lower(inputs, upstream).compile() if self.jit else both)

        def forward() -> dict[str, Any]:
            return dict(zip(("y", "s", "z"), jax.block_until_ready(run_forward(inputs)), strict=False))

        def forward_backward() -> dict[str, Any]:
            outputs, grads = jax.block_until_ready(compiled()(inputs, upstream))
            return dict(zip(("y", "s", "z"), outputs, strict=False)) | {f"d{name}": x for name, x in grads.items()}

        return Prepared(forward, forward_backward, on_device, compiled)


class TorchTwin:
    name = "torch_power"
    framework = "torch"

    def implementations(self, operation: str) -> tuple[str, ...]:
        choice = importlib.import_module("torch_power.choice")
        return choice.CHOICE.names(operation)

    def scope(self, dtype: str) -> contextlib.AbstractContextManager[Any]:
        del dtype
        return contextlib.nullcontext()

    def array(self, x: np.ndarray, device: str) -> Any:
        torch = importlib.import_module("torch")
        if x.dtype.name == "bfloat16":
            return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16).to(device)
        return torch.from_numpy(x.copy()).to(device)

    def numpy(self, x: Any) -> np.ndarray:
        torch = importlib.import_module("torch")
        x = x.detach().cpu().contiguous()
        if x.dtype == torch.bfloat16:
            ml_dtypes = importlib.import_module("ml_dtypes")
            return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return x.numpy()

    def prepare_power(
        self,
        arrays: Mapping[str, np.ndarray],
        options: Mapping[str, Any],
        implementation: str | None,
        device: str = "cpu",
    ) -> Prepared:
        torch, torch_power = importlib.import_module("torch"), importlib.import_module("torch_power")
        on_device = {name: self.array(x, device) for name, x in arrays.items()}
        inputs = {name: on_device[name] for name in ARGUMENTS if name in on_device}
        upstream = tuple(on_device[name] for name in UPSTREAM if name in on_device)

        def call(inputs: dict[str, Any]) -> tuple[Any, ...]:
            state = torch_power.PowerState(inputs["s0"], inputs["z0"]) if "s0" in inputs else None
            result = torch_power.power_attention(
                inputs["q"], inputs["k"], inputs["v"], inputs.get("log_g"), initial_state=state,
                implementation=implementation, **options,
            )  # fmt: skip
            return (result[0], *result[1]) if options.get("return_state") else (result,)

        def wait() -> None:
            if device == "cuda":
                torch.cuda.synchronize()

        def forward() -> dict[str, Any]:
            with torch.no_grad():
                outputs = call(inputs)
            wait()
            return dict(zip(("y", "s", "z"), outputs, strict=False))

        def forward_backward() -> dict[str, Any]:
            leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
            outputs = call(leaves)
            grads = torch.autograd.grad(outputs, tuple(leaves.values()), upstream)
            wait()
            named = zip(leaves, grads, strict=True)
            return dict(zip(("y", "s", "z"), outputs, strict=False)) | {f"d{name}": x for name, x in named}

        return Prepared(forward, forward_backward, on_device, lambda: None)


JAX, TORCH = JaxTwin(), TorchTwin()


def present(jax_twin: Twin = JAX) -> tuple[Twin, ...]:
    """The twins whose framework is installed here."""
    return tuple(twin for twin in (jax_twin, TORCH) if importlib.util.find_spec(twin.framework) is not None)
