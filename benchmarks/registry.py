"""The contestants: our implementations in both packages, the frameworks' own attention, and peers where installed.

A contestant is a name and a function of q, k, v [, log_g] in its framework. To add one, yield it from `_peers`, or from
the function of the framework it belongs to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bridge import cases, measure, twins

DIFFERENTIABLE = ("q", "k", "v", "log_g")


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is computed: causal self-attention on `[b, t, h, d]`, with gates for power attention if `gates`."""

    t: int
    b: int = 1
    h_q: int = 4
    h_kv: int = 4
    d: int = 64
    e: int = 64
    deg: int = 2
    dtype: str = "float32"
    gates: bool = True

    def make(self, seed: int = 0) -> dict[str, np.ndarray]:
        """q, k, v, dy and, with gates, log_g: random, the same bytes for every contestant."""
        case = cases.Case(
            "benchmark", b=self.b, t=self.t, h_q=self.h_q, h_kv=self.h_kv, d=self.d, e=self.e, deg=self.deg,
            gates="mild" if self.gates else None,
        )  # fmt: skip
        return case.make(self.dtype, seed)


class Ready(NamedTuple):
    """A contestant with its inputs on the device.

    Fields:
      launch: passes "forward" and "both" → a function of dy that starts one and returns outputs by name, without waiting.
      array: puts an upstream gradient dy on the device.
      wait: returns when what was launched is done.
      numpy: brings an output back, in the layout of the inputs given.
    """

    launch: Mapping[str, Callable[[Any], dict[str, Any]]]
    array: Callable[[np.ndarray], Any]
    wait: Callable[[Any], None]
    numpy: Callable[[Any], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Contestant:
    """Someone to be timed.

    Fields:
      function: `function(shape)` imports what is needed and returns y = f(q, k, v[, log_g]) for that shape.
      heads_first: f takes and returns `[b, h, t, d]`, as PyTorch's own function does; inputs are made so before.
      slack: how many times the contract's bound an error may be before the result counts as wrong. Ours promise that
        bound; for others, which promise none, it tells rounding from mistakes.
    """

    name: str
    framework: str
    operation: str
    function: Callable[[Shape], Callable[..., Any]]
    heads_first: bool = False
    slack: float = 1.0
    devices: tuple[str, ...] = ("cpu", "cuda")

    def bounds(self, dtype: str, device: str) -> dict[str, float]:
        """Errors beyond which the result is wrong, by name."""
        # Kernels may round to 16 bits inside: others', ours that are named fused, and what we choose ourselves on a GPU.
        fused = (*cases.FUSED, "auto") if device == "cuda" else cases.FUSED
        may_round = self.slack != 1.0 or not set(self.name.split("/")).isdisjoint(fused)
        return {name: self.slack * x for name, x in cases.bounds(dtype, "cuda" if may_round else "portable").items()}

    def prepare(self, shape: Shape, arrays: Mapping[str, np.ndarray], device: str) -> Ready:
        """Put `arrays` (q k v [log_g]) on the device.

        Raises:
          NotImplementedError: it cannot serve this call.
        """
        names = [name for name in DIFFERENTIABLE if name in arrays and (self.operation == "power" or name != "log_g")]
        operands = {name: self._turn(arrays[name]) for name in names}
        return {"jax": _prepare_jax, "torch": _prepare_torch}[self.framework](self, shape, operands, device)

    def _turn(self, x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.swapaxes(x, 1, 2)) if self.heads_first and x.ndim == 4 else x


def _prepare_jax(contestant: Contestant, shape: Shape, arrays: Mapping[str, np.ndarray], device: str) -> Ready:
    jax, function = importlib.import_module("jax"), contestant.function(shape)
    operands = tuple(twins.JAX.array(x, device) for x in arrays.values())

    @jax.jit
    def forward(*operands: Any) -> dict[str, Any]:
        return {"y": function(*operands)}

    @jax.jit
    def both(operands: tuple[Any, ...], dy: Any) -> dict[str, Any]:
        y, pull_back = jax.vjp(function, *operands)
        return {"y": y} | dict(zip([f"d{name}" for name in arrays], pull_back(dy), strict=True))

    return Ready(
        {"forward": lambda dy: forward(*operands), "both": lambda dy: both(operands, dy)},
        lambda dy: twins.JAX.array(contestant._turn(dy), device),
        jax.block_until_ready,
        lambda x: contestant._turn(twins.JAX.numpy(x)),
    )


def _prepare_torch(contestant: Contestant, shape: Shape, arrays: Mapping[str, np.ndarray], device: str) -> Ready:
    torch, function = importlib.import_module("torch"), contestant.function(shape)
    leaves = [twins.TORCH.array(x, device).requires_grad_() for x in arrays.values()]

    def forward(dy: Any) -> dict[str, Any]:
        del dy
        with torch.no_grad():
            return {"y": function(*leaves)}

    def both(dy: Any) -> dict[str, Any]:
        y = function(*leaves)
        grads = torch.autograd.grad(y, leaves, dy)
        return {"y": y.detach()} | dict(zip([f"d{name}" for name in arrays], grads, strict=True))

    def wait(result: Any) -> None:
        del result
        if device == "cuda":
            torch.cuda.synchronize()

    return Ready(
        {"forward": forward, "both": both},
        lambda dy: twins.TORCH.array(contestant._turn(dy), device),
        wait,
        lambda x: contestant._turn(twins.TORCH.numpy(x)),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Ours
# ---------------------------------------------------------------------------------------------------------------------


def _ours(twin: twins.Twin) -> Iterator[Contestant]:
    """Every implementation of a package in every form meant for whole sequences, and what it chooses itself."""
    package = twin.name
    for name in (None, *twin.implementations(measure.OPERATIONS[package]["power"])):
        for form in ("auto",) if name is None else ("attention", "chunked"):
            make = functools.partial(_power, package, name, form)
            yield Contestant("/".join(filter(None, (package, name, form))), twin.framework, "power", make)
    for name in twin.implementations(measure.OPERATIONS[package]["sdpa"]):
        make = functools.partial(_jax_sdpa if twin.framework == "jax" else _torch_sdpa, package, name)
        yield Contestant(f"{package}/{name}/sdpa", twin.framework, "sdpa", make, heads_first=twin.framework == "torch")


def _power(package: str, name: str | None, form: str, shape: Shape) -> Callable[..., Any]:
    module = importlib.import_module(package)
    return functools.partial(module.power_attention, deg=shape.deg, form=form, implementation=name)


def _jax_sdpa(package: str, name: str, shape: Shape) -> Callable[..., Any]:
    del shape
    module = importlib.import_module(package)
    return functools.partial(module.dot_product_attention, is_causal=True, implementation=name)


def _torch_sdpa(package: str, name: str, shape: Shape) -> Callable[..., Any]:
    module = importlib.import_module(package)
    gqa = shape.h_q != shape.h_kv
    return functools.partial(module.scaled_dot_product_attention, is_causal=True, enable_gqa=gqa, implementation=name)


# ---------------------------------------------------------------------------------------------------------------------
# The frameworks' own
# ---------------------------------------------------------------------------------------------------------------------

# PyTorch's choice, and its backends on a GPU by name.
TORCH_BACKENDS = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}


def _frameworks() -> Iterator[Contestant]:
    if importlib.util.find_spec("torch"):
        make = functools.partial(_torch_own, None)
        yield Contestant("torch/sdpa", "torch", "sdpa", make, heads_first=True, slack=2.0)
        for name, backend in TORCH_BACKENDS.items():
            make = functools.partial(_torch_own, backend)
            yield Contestant(f"torch/sdpa-{name}", "torch", "sdpa", make, heads_first=True, slack=2.0, devices=("cuda",))
    if importlib.util.find_spec("jax"):
        for name, devices in (("xla", ("cpu", "cuda")), ("cudnn", ("cuda",))):
            make = functools.partial(_jax_own, name)
            yield Contestant(f"jax/sdpa-{name}", "jax", "sdpa", make, slack=2.0, devices=devices)


def _torch_own(backend: str | None, shape: Shape) -> Callable[..., Any]:
    attention = importlib.import_module("torch.nn.attention")
    functional = importlib.import_module("torch.nn.functional")
    scope: Callable[[], Any] = contextlib.nullcontext
    if backend is not None:
        scope = functools.partial(attention.sdpa_kernel, getattr(attention.SDPBackend, backend))

    def call(q: Any, k: Any, v: Any) -> Any:
        with scope():
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shape.h_q != shape.h_kv)

    return call


def _jax_own(name: str, shape: Shape) -> Callable[..., Any]:
    del shape
    jax = importlib.import_module("jax")
    return functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=name)


# ---------------------------------------------------------------------------------------------------------------------
# Peers
# ---------------------------------------------------------------------------------------------------------------------

# Its chunk length: the one its authors benchmark with.
RETENTION_CHUNK = 1024


def _peers() -> Iterator[Contestant]:
    """The existing power attention library, where it is installed (it needs a GPU)."""
    if importlib.util.find_spec("retention"):
        for backend in ("triton", "vidrial"):
            make = functools.partial(_retention, backend)
            yield Contestant(f"retention/{backend}", "torch", "power", make, slack=2.0, devices=("cuda",))


def _retention(backend: str, shape: Shape) -> Callable[..., Any]:
    library = importlib.import_module(f"retention.{backend}")
    options = {"deg": shape.deg, "scale": shape.d**-0.5, "chunk_size": min(RETENTION_CHUNK, shape.t)}

    def call(q: Any, k: Any, v: Any, log_g: Any = None) -> Any:
        return library.power_retention(q, k, v, log_g, **options)

    return call


def device_names(device: str) -> dict[str, str]:
    """What each installed framework that sees `device` calls it, by framework."""
    names = {}
    for twin in twins.present():
        try:
            names[twin.framework] = measure.describe(twin.name, device)["device"]
        except ValueError:
            continue
    return names


def contestants(device: str) -> tuple[Contestant, ...]:
    """Everyone who can be called here on `device`, in registry order."""
    ours = [contestant for twin in twins.present() for contestant in _ours(twin)]
    seen = device_names(device)
    return tuple(x for x in (*ours, *_frameworks(), *_peers()) if device in x.devices and x.framework in seen)


def select(everyone: Sequence[Contestant], patterns: Sequence[str]) -> tuple[Contestant, ...]:
    """Those whose name matches one of the shell patterns ("torch_power/*"), in registry order; all for no patterns.

    Raises:
      ValueError: a pattern matches nobody.
    """
    for pattern in patterns:
        if not fnmatch.filter([x.name for x in everyone], pattern):
            raise ValueError(f"contestants={pattern!r}: nobody here; expected some of {', '.join(x.name for x in everyone)}")
    return tuple(x for x in everyone if not patterns or any(fnmatch.fnmatchcase(x.name, pattern) for pattern in patterns))
