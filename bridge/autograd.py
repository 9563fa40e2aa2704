"""A JAX function as a differentiable PyTorch function, and a PyTorch function as a differentiable JAX function.

    f = jax_to_torch(jax_function)      f(tensors) -> tensors;  backward() runs JAX's gradient
    g = torch_to_jax(torch_function)    g(arrays) -> arrays;    jit, grad and vmap work, PyTorch runs in a host callback

`jax_to_torch` stays on the device of its tensors and shares their memory both ways (`bridge.dlpack`); it copies only
what cannot be shared: views with gaps, unaligned tensors, and results that are one of the inputs. `torch_to_jax` is a
`jax.pure_callback`: inputs and results are copied, and on a GPU they pass through host memory.

Complex gradients follow the convention of the framework that asks: PyTorch's is the conjugate of JAX's.

Importing this module imports neither framework; wrapping a function needs both.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from bridge.dlpack import DTYPES, array_to_torch, tensor_to_jax

if TYPE_CHECKING:
    import jax
    import numpy as np
    import torch

VmapMethod = Literal["sequential", "expand_dims", "broadcast_all"]


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static about one call: where the arrays sit among the arguments, and everything that is no array.

    Two calls that compare equal run the same compiled code. The types are part of it because 1 == 1.0 == True.
    """

    structure: Any
    is_array: tuple[bool, ...]
    settings: tuple[Any, ...]
    types: tuple[type, ...]
    wanted: tuple[bool, ...] = ()
    vmaps: tuple[tuple[int | None, ...], ...] = ()

    def arguments(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's (args, kwargs) with `arrays` in their places."""
        import jax

        arrays_left, settings_left = iter(arrays), iter(self.settings)
        leaves = [next(arrays_left) if is_array else next(settings_left) for is_array in self.is_array]
        return jax.tree_util.tree_unflatten(self.structure, leaves)


def jax_to_torch(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, written in JAX, as a function of PyTorch tensors that PyTorch can differentiate.

    Arguments and results are pytrees. Every tensor becomes a JAX array of the same dtype; everything else (numbers,
    strings, None) is a static setting that `function` sees as it is. Each new value of a setting compiles anew: pass
    a tensor for a value that changes. `function` and its gradient are compiled once for each combination of shapes,
    dtypes, settings and tensors that need a gradient, and only the gradients that autograd asks for are computed.
    Results that are not floating-point are not differentiable, as in PyTorch.

    What the gradient needs is saved as PyTorch saves it (so `torch.utils.checkpoint` and saved-tensor hooks work).
    Inputs and results among it are shared with the caller, not copied: writing to one of them in place before
    backward raises PyTorch's usual "modified by an inplace operation".

    Works under `torch.no_grad`, `torch.func.grad` and `torch.func.vmap`. Not differentiable twice: take higher
    derivatives inside `function`, with JAX.

    Args:
      function: from pytrees of arrays and settings to a pytree of arrays; `jax.jit` must be able to trace it.
    Returns:
      The same function on tensors, with the name and docstring of `function`.
    Raises (when called):
      TypeError: no argument is a tensor, a setting is not hashable, or JAX cannot hold a tensor.
      ValueError: a tensor is 64-bit while JAX's x64 mode is off.
      RuntimeError: on differentiating the gradient.
    """
    import jax
    import torch

    name = getattr(function, "__name__", type(function).__name__)
    compiled = _CompiledJax(function)

    @torch.compiler.disable  # torch.compile breaks its graph here; it cannot trace JAX
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree_util.tree_flatten((args, kwargs))
        call, tensors = _split(name, leaves, structure, torch.Tensor, "torch.Tensor")
        wanted = tuple(
            torch.is_grad_enabled() and x.requires_grad and (x.is_floating_point() or x.is_complex()) for x in tensors
        )
        record = _Record(name, compiled, dataclasses.replace(call, wanted=wanted), _x64())
        # Empty pieces of the differentiated tensors. The gradient takes them as arguments, so that it is seen to depend
        # on those tensors even where it saves nothing of them: differentiating it must raise, not give zero.
        anchors = [torch.atleast_1d(x)[..., :0].clone() for x, want in zip(tensors, wanted, strict=True) if want]
        results = _functions().Forward.apply(record, *tensors, *anchors)
        record.own = []  # saved by now, once per level of torch.func; PyTorch alone decides how long they live
        return jax.tree_util.tree_unflatten(record.results, results)

    return wrapper


class _CompiledJax:
    """The compiled forms of one JAX function: alone, with what its gradient needs, and the gradient."""

    def __init__(self, function: Callable[..., Any]):
        import jax

        self.function = function
        self.run = jax.jit(self._run, static_argnums=0)
        self.run_and_save = jax.jit(self._run_and_save, static_argnums=0)
        self.pull_back = jax.jit(_pull_back)

    def _run(self, call: _Call, arrays: Sequence[jax.Array]) -> Any:
        import jax

        def run(*arrays: jax.Array) -> Any:
            args, kwargs = call.arguments(arrays)
            return jax.tree_util.tree_map(jax.numpy.asarray, self.function(*args, **kwargs))

        for in_axes in call.vmaps:
            run = jax.vmap(run, in_axes)
        return run(*arrays)

    def _run_and_save(self, call: _Call, arrays: Sequence[jax.Array]) -> tuple[Any, list[jax.Array], Any]:
        """Returns the results, the residuals of the gradient, and a `_Pullback` that says how to use them."""
        import jax

        def run(wanted: Sequence[jax.Array]) -> tuple[list[jax.Array], Any]:
            given = iter(wanted)
            results = self._run(call, [next(given) if want else x for want, x in zip(call.wanted, arrays, strict=True)])
            return [x for x in jax.tree_util.tree_leaves(results) if _is_inexact(x)], results

        wanted = [x for want, x in zip(call.wanted, arrays, strict=True) if want]
        _, vjp, results = jax.vjp(run, wanted, has_aux=True)
        leaves, structure = jax.tree_util.tree_flatten(vjp)
        # A residual that is an input or a result is known by identity while tracing, and need not be stored again.
        known = [*arrays, *jax.tree_util.tree_leaves(results)]
        sources = tuple(next((i for i, x in enumerate(known) if x is leaf), None) for leaf in leaves)
        own = [leaf for leaf, source in zip(leaves, sources, strict=True) if source is None]
        pullback = _Pullback(structure, sources, tuple(sorted({i for i in sources if i is not None})))
        return results, own, jax.tree_util.Partial(pullback)


@dataclasses.dataclass(frozen=True, eq=False)
class _Pullback:
    """The static half of a gradient: which residual is which input or result, and the tree they go back into.

    Compared by identity: JAX keeps the one made while tracing, so the gradient compiles once per trace.
    """

    structure: Any
    sources: tuple[int | None, ...]  # per residual: its place among inputs and results, None if it has its own memory
    shared: tuple[int, ...]  # the places among inputs and results that are needed at all, in order

    def __call__(self, saved: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
        import jax
        import jax.numpy as jnp

        shared = dict(zip(self.shared, saved[: len(self.shared)], strict=True))
        own = iter(saved[len(self.shared) :])
        leaves = [next(own) if source is None else shared[source] for source in self.sources]
        (gradients,) = jax.tree_util.tree_unflatten(self.structure, leaves)([jnp.conj(x) for x in cotangents])
        return [jnp.conj(x) for x in gradients]


def _pull_back(pullback: Callable[..., Any], saved: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
    return pullback(saved, cotangents)


@dataclasses.dataclass(eq=False)
class _Record:
    """One call of a wrapped JAX function, from its forward to its backward. Opaque to PyTorch.

    x64 is the caller's mode. It is kept because it is a setting of the thread, and backward may run in another one.
    """

    name: str
    compiled: _CompiledJax
    call: _Call
    x64: bool
    results: Any = None  # the structure of the results
    pullback: Any = None
    own: list[Any] = dataclasses.field(default_factory=list)  # residuals, on their way to save_for_backward
    opaque: dict[int, Any] = dataclasses.field(default_factory=dict)  # residuals that PyTorch cannot hold, by place


@functools.cache
def _functions() -> types.SimpleNamespace:
    """The two `torch.autograd.Function`s, made on first use so that importing this module does not import torch."""
    import jax
    import torch

    class Forward(torch.autograd.Function):
        """(record, *tensors, *anchors) -> flat results."""

        @staticmethod
        def forward(record: _Record, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            tensors = inputs[: len(record.call.wanted)]
            arrays = [tensor_to_jax(f"{record.name}: tensor {i}", x.detach()) for i, x in enumerate(tensors)]
            if any(record.call.wanted):
                results, own, record.pullback = record.compiled.run_and_save(record.call, arrays)
                record.opaque = {i: x for i, x in enumerate(own) if str(x.dtype) not in DTYPES}
                record.own = [array_to_torch("residual", x) for i, x in enumerate(own) if i not in record.opaque]
            else:
                results = record.compiled.run(record.call, arrays)
            leaves, record.results = jax.tree_util.tree_flatten(results)
            return _unshared(record.name, leaves, tensors)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
            record, tensors = inputs[0], inputs[1 : 1 + len(inputs[0].call.wanted)]
            ctx.record, anchors = record, inputs[1 + len(tensors) :]
            ctx.mark_non_differentiable(*(x for x in output if not (x.is_floating_point() or x.is_complex())))
            if record.pullback is not None:
                known = [*tensors, *output]
                shared = [known[i] for i in record.pullback.func.shared]
                ctx.save_for_backward(*shared, *record.own, *anchors)

        @staticmethod
        def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            wanted = ctx.record.call.wanted
            inexact = [x for x in cotangents if x.is_floating_point() or x.is_complex()]
            gradients = iter(Backward.apply(ctx.record, len(inexact), *inexact, *ctx.saved_tensors))
            return (None, *(next(gradients) if want else None for want in wanted), *(None for _ in range(sum(wanted))))

        @staticmethod
        def vmap(_: Any, in_dims: tuple[int | None, ...], record: _Record, *inputs: torch.Tensor) -> Any:
            # The tensors' batch axes become axes of `jax.vmap`; a new record, since its gradient is another function.
            call = dataclasses.replace(
                record.call, vmaps=(*record.call.vmaps, in_dims[1 : 1 + len(record.call.wanted)])
            )
            batched = _Record(record.name, record.compiled, call, record.x64)
            results = Forward.apply(batched, *inputs)
            batched.own = []
            record.results = batched.results
            return results, (0,) * len(results)

    class Backward(torch.autograd.Function):
        """(record, number of cotangents, *cotangents, *saved, *anchors) -> gradients of the wanted tensors."""

        @staticmethod
        def forward(record: _Record, n: int, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            tensors = inputs[: len(inputs) - sum(record.call.wanted)]
            with jax.enable_x64(record.x64):
                arrays = [tensor_to_jax(f"{record.name}: gradient", x.detach()) for x in tensors]
                saved = arrays[n:]
                for place, residual in record.opaque.items():
                    saved.insert(len(record.pullback.func.shared) + place, residual)
                gradients = record.compiled.pull_back(record.pullback, saved, arrays[:n])
            return _unshared(record.name, gradients, tensors)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
            ctx.record = inputs[0]

        @staticmethod
        def backward(ctx: Any, *_: torch.Tensor) -> None:
            raise RuntimeError(
                f"{ctx.record.name}: the gradient of a function from jax_to_torch cannot be differentiated again; take "
                "the higher derivative in JAX, inside the function that is wrapped"
            )

        @staticmethod
        def vmap(_: Any, in_dims: Any, record: _Record, *tensors: Any) -> None:
            raise NotImplementedError(
                f"{record.name}: torch.func.vmap over the gradient of a function from jax_to_torch is not supported; "
                "wrap jax.vmap(jax.grad(function)) instead, or take torch.func.grad of the torch.func.vmap"
            )

    return types.SimpleNamespace(Forward=Forward, Backward=Backward)


def _unshared(name: str, arrays: Sequence[jax.Array], inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The arrays as tensors, none of which shares memory with an input or with another: PyTorch may write to them."""
    taken = {x.data_ptr() for x in inputs if x.numel()}
    tensors = []
    for i, array in enumerate(arrays):
        x = array_to_torch(f"{name}: result {i}", array)
        tensors.append(x.clone() if x.data_ptr() in taken else x)
        taken.add(x.data_ptr())
    return tuple(tensors)


def torch_to_jax(
    function: Callable[..., Any],
    *,
    result_shape_dtypes: Any = None,
    device: torch.device | str = "cpu",
    vmap_method: VmapMethod = "sequential",
) -> Callable[..., Any]:
    """`function`, written in PyTorch, as a function of JAX arrays that JAX can compile, differentiate and batch.

    Arguments and results are pytrees. Every JAX or NumPy array becomes a tensor of the same dtype; everything else
    (numbers, strings, None) is a static setting that `function` sees as it is. Under `jit` the function becomes a
    `jax.pure_callback`, so JAX may run it any number of times or not at all: it must depend on its arguments alone,
    without dropout and without side effects. Weights of a module get gradients if they are arguments
    (`torch.func.functional_call`); others are constants.

    Reverse mode only, and once: the gradient runs `function` again and differentiates it with `torch.autograd.grad`,
    so nothing is kept between forward and backward, and only the gradients that JAX asks for are computed.
    Integer arguments and results have no gradient.

    Every call copies its arguments to new tensors (through host memory on a GPU) and its results back.

    Args:
      function: from pytrees of tensors and settings to a pytree of tensors.
      result_shape_dtypes: a pytree of `jax.ShapeDtypeStruct` like the results, for one unbatched call. By default it is
        found by running `function` on fake tensors, which fails where the shapes depend on values.
      device: where the tensors are when `function` sees them.
      vmap_method: what `jax.vmap` does. "sequential" calls `function` once per element. "expand_dims" and
        "broadcast_all" call it once under `torch.func.vmap`, which it must support; "expand_dims" leaves arguments that
        are not batched as they are.
    Returns:
      The same function on arrays, with the name and docstring of `function`.
    Raises (when called, or when traced under `jit`):
      TypeError: no argument is an array, a setting is not hashable, or a result is not a tensor that JAX can hold.
      ValueError: fake tensors cannot run `function`, a result is 64-bit while JAX's x64 mode is off, or a result does
        not have the shape that was found or given.
    """
    import jax
    import numpy as np

    name = getattr(function, "__name__", type(function).__name__)
    methods = ("sequential", "expand_dims", "broadcast_all")
    if vmap_method not in methods:
        raise ValueError(f"torch_to_jax: vmap_method={vmap_method!r} must be one of {', '.join(methods)}")

    @functools.lru_cache(maxsize=1024)
    def callback_for(call: _Call, arguments: tuple[jax.ShapeDtypeStruct, ...], x64: bool) -> Callable[..., Any]:
        del x64  # part of the key only: the dtypes of results depend on it
        host = _HostFunction(name, function, call, arguments, device, result_shape_dtypes)
        return _differentiable_callback(host, vmap_method)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree_util.tree_flatten((args, kwargs))
        call, arrays = _split(name, leaves, structure, (jax.Array, np.ndarray), "JAX array")
        arrays = [jax.numpy.asarray(x) for x in arrays]
        shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
        return callback_for(call, shapes, _x64())(*arrays)

    return wrapper


def _differentiable_callback(host: _HostFunction, vmap_method: VmapMethod) -> Callable[..., Any]:
    """Arrays -> tree of results, through host callbacks, with the host's gradient as its gradient."""
    import jax

    def callback(run: Callable[..., Any], shapes: Any, *arrays: Any) -> Any:
        return jax.pure_callback(run, shapes, *arrays, vmap_method=vmap_method)

    @jax.custom_vjp
    def apply(*arrays: jax.Array) -> list[jax.Array]:
        return callback(host.forward, host.results, *arrays)

    def forward(*primals: Any) -> tuple[list[jax.Array], Any]:
        arrays = [primal.value for primal in primals]
        # Which gradients are wanted is static, but a residual must be made of arrays: it travels as a tree's shape.
        wanted = tuple(() if primal.perturbed and _is_inexact(primal.value) else None for primal in primals)
        return callback(host.forward, host.results, *arrays), (arrays, wanted)

    def backward(residuals: Any, cotangents: Sequence[Any]) -> tuple[Any, ...]:
        arrays, wanted = residuals
        places = tuple(i for i, want in enumerate(wanted) if want is not None)
        if not places:
            return (None,) * len(arrays)
        dense = [
            jax.numpy.zeros(x.shape, x.dtype) if type(x) is jax.custom_derivatives.SymbolicZero else x
            for x, result in zip(cotangents, host.results, strict=True)
            if _is_inexact(result)
        ]
        shapes = [host.arguments[i] for i in places]
        gradients = iter(callback(functools.partial(host.backward, places), shapes, *arrays, *dense))
        return tuple(None if want is None else next(gradients) for want in wanted)

    apply.defvjp(forward, backward, symbolic_zeros=True)
    return lambda *arrays: jax.tree_util.tree_unflatten(host.results_structure, apply(*arrays))


class _HostFunction:
    """One PyTorch function at one set of argument shapes: what runs inside the host callbacks."""

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        call: _Call,
        arguments: tuple[jax.ShapeDtypeStruct, ...],
        device: torch.device | str,
        result_shape_dtypes: Any,
    ):
        import jax

        self.name, self.function, self.call, self.arguments, self.device = name, function, call, arguments, device
        for i, x in enumerate(arguments):
            if str(x.dtype) not in DTYPES:
                raise TypeError(f"{name}: array {i} has dtype {x.dtype}, which PyTorch lacks")
        if result_shape_dtypes is None:
            result_shape_dtypes = self._infer()
        self.results, self.results_structure = jax.tree_util.tree_flatten(result_shape_dtypes)
        for i, x in enumerate(self.results):
            if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
                raise ValueError(
                    f"{name}: result {i} has dtype {x.dtype} while JAX is in 32-bit mode; call "
                    'jax.config.update("jax_enable_x64", True) before any JAX work, or return a 32-bit tensor'
                )

    def forward(self, *arrays: Any) -> list[np.ndarray]:
        """The flat results. Each array may have batch axes in front, all the same number of them."""
        import torch

        tensors = [_to_tensor(x, self.device) for x in arrays]
        with torch.no_grad():
            return [_to_numpy(x) for x in _batched(self._run, tensors, tensors[0].ndim - len(self.arguments[0].shape))]

    def backward(self, places: tuple[int, ...], *arrays_and_cotangents: Any) -> list[np.ndarray]:
        """The gradients of the arguments at `places`, from the arguments and a cotangent per inexact result."""
        import torch

        tensors = [_to_tensor(x, self.device) for x in arrays_and_cotangents]
        n = len(self.arguments)
        batch_axes = tensors[0].ndim - len(self.arguments[0].shape)

        def gradients(*tensors: torch.Tensor) -> list[torch.Tensor]:
            arguments, cotangents = list(tensors[:n]), [x.conj() for x in tensors[n:]]
            pull = self._pull_batched if batch_axes else self._pull
            return [x.conj() for x in pull(places, arguments, cotangents)]

        with torch.enable_grad():
            return [_to_numpy(x) for x in _batched(gradients, tensors, batch_axes)]

    def _pull(self, places: Sequence[int], arguments: list[Any], cotangents: list[Any]) -> list[torch.Tensor]:
        import torch

        wanted = [arguments[i].requires_grad_() for i in places]
        results = [x for x in self._run(*arguments) if x.is_floating_point() or x.is_complex()]
        reached = [i for i, x in enumerate(results) if x.requires_grad]
        if not reached:
            return [torch.zeros_like(x) for x in wanted]
        return list(
            torch.autograd.grad(
                [results[i] for i in reached], wanted, [cotangents[i] for i in reached], materialize_grads=True
            )
        )

    def _pull_batched(self, places: Sequence[int], arguments: list[Any], cotangents: list[Any]) -> list[torch.Tensor]:
        # Inside torch.func.vmap only torch.func can differentiate.
        import torch

        def run(*wanted: torch.Tensor) -> tuple[torch.Tensor, ...]:
            merged = list(arguments)
            for i, x in zip(places, wanted, strict=True):
                merged[i] = x
            return tuple(x for x in self._run(*merged) if x.is_floating_point() or x.is_complex())

        pull = torch.func.vjp(run, *(arguments[i] for i in places))[1]
        return list(pull(tuple(cotangents)))

    def _run(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """The flat results of one unbatched call, checked against what JAX was told."""
        import jax

        leaves, structure = jax.tree_util.tree_flatten(self._call(tensors))
        got = [(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in leaves]
        expected = [(tuple(x.shape), str(x.dtype)) for x in self.results]
        if (structure, got) != (self.results_structure, expected):
            raise ValueError(f"{self.name}: the results are {got}, not {expected} as found or given before the call")
        return leaves

    def _call(self, tensors: Sequence[torch.Tensor]) -> Any:
        import jax
        import torch

        args, kwargs = self.call.arguments(tensors)
        results = self.function(*args, **kwargs)
        for i, x in enumerate(jax.tree_util.tree_leaves(results)):
            if not isinstance(x, torch.Tensor):
                raise TypeError(f"{self.name}: result {i} is a {type(x).__name__}; every result must be a torch.Tensor")
        return results

    def _infer(self) -> Any:
        """The tree of result shapes, from a run on fake tensors: no memory, no arithmetic."""
        import jax
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode

        def struct(x: torch.Tensor) -> jax.ShapeDtypeStruct:
            name = str(x.dtype).removeprefix("torch.")
            if name not in DTYPES:
                raise TypeError(f"{self.name}: a result has dtype {name}, which JAX lacks")
            return jax.ShapeDtypeStruct(tuple(x.shape), jax.numpy.dtype(name))

        # Real tensors may take part, such as the weights of a module that `function` closes over.
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            fakes = [
                torch.empty(x.shape, dtype=getattr(torch, str(x.dtype)), device=self.device) for x in self.arguments
            ]
            try:
                results = self._call(fakes)
            except TypeError:
                raise
            except Exception as error:
                shapes = [(tuple(x.shape), str(x.dtype)) for x in self.arguments]
                raise ValueError(
                    f"{self.name}: running it on fake tensors of {shapes} to find the shapes of its results failed: "
                    f"{error}. If it needs the values, pass result_shape_dtypes to torch_to_jax"
                ) from error
        return jax.tree_util.tree_map(struct, results)


def _batched(run: Callable[..., Any], tensors: Sequence[torch.Tensor], batch_axes: int) -> list[torch.Tensor]:
    """`run` mapped over the leading `batch_axes` axes, each of full length or, where not batched, of length 1."""
    import torch

    if batch_axes == 0:
        return list(run(*tensors))
    size = max(x.shape[0] for x in tensors)
    in_dims = tuple(0 if x.shape[0] == size else None for x in tensors)
    arguments = [x if dim == 0 else x[0] for x, dim in zip(tensors, in_dims, strict=True)]
    inner = functools.partial(_batched, run, batch_axes=batch_axes - 1)
    return torch.func.vmap(lambda *tensors: inner(tensors), in_dims)(*arguments)


def _to_tensor(x: Any, device: torch.device | str) -> torch.Tensor:
    """A tensor of its own: PyTorch code may write in place, and JAX arrays must not change."""
    import numpy as np
    import torch

    copy = np.array(x, order="C")
    name = str(copy.dtype)
    if copy.dtype.isbuiltin == 1:
        return torch.from_numpy(copy).to(device)
    # NumPy's view of bfloat16 and float8 comes from another package, which PyTorch does not know: pass the bits.
    return torch.from_numpy(copy.view(f"uint{8 * copy.itemsize}")).view(getattr(torch, name)).to(device)


def _to_numpy(x: torch.Tensor) -> np.ndarray:
    import jax.numpy as jnp
    import torch

    dense = x.detach().cpu().resolve_conj().resolve_neg().contiguous()
    dtype = jnp.dtype(str(x.dtype).removeprefix("torch."))
    if dtype.isbuiltin == 1:
        return dense.numpy()
    return dense.view(getattr(torch, f"uint{8 * dtype.itemsize}")).numpy().view(dtype)


def _split(
    name: str, leaves: Sequence[Any], structure: Any, array_type: Any, array_name: str
) -> tuple[_Call, list[Any]]:
    """The arrays among `leaves`, and the `_Call` that holds everything else."""
    is_array = tuple(isinstance(leaf, array_type) for leaf in leaves)
    arrays = [leaf for leaf, is_it in zip(leaves, is_array, strict=True) if is_it]
    settings = tuple(leaf for leaf, is_it in zip(leaves, is_array, strict=True) if not is_it)
    for setting in settings:
        try:
            hash(setting)
        except TypeError as error:
            raise TypeError(
                f"{name}: an argument is a {type(setting).__module__}.{type(setting).__qualname__}; every argument "
                f"must be a {array_name} or a hashable setting"
            ) from error
    if not arrays:
        raise TypeError(f"{name}: no argument is a {array_name}")
    return _Call(structure, is_array, settings, tuple(type(x) for x in settings)), arrays


def _x64() -> bool:
    """Whether JAX's 64-bit mode is on in this thread."""
    import jax

    return jax.dtypes.canonicalize_dtype("int64") == "int64"


def _is_inexact(x: Any) -> bool:
    import jax.numpy as jnp

    return jnp.issubdtype(x.dtype, jnp.inexact)
