"""Arrays and trees of arrays from JAX to PyTorch and back, without a copy where the frameworks allow.

Both directions go through DLPack, which hands over a pointer and leaves a number of traps: 64-bit values silently
narrowed, unaligned tensors silently copied, strided views refused with a message about compact striding. Here each of
them is either made right or a clear error; which of the two, `copy` decides:

    copy=None   share the memory where that is possible, else copy (the default)
    copy=True   always new memory: writes on one side are never seen on the other
    copy=False  share the memory or raise ValueError saying why it cannot be shared

**Aliasing.** A shared array *is* the other framework's memory. PyTorch writes in place, and such a write shows
through in the JAX array, which JAX believes to be immutable; so write to a shared tensor only when nothing on the JAX
side still needs the old values. JAX also computes asynchronously: after `y = f(to_jax(x))` call
`y.block_until_ready()` (or read `y`, or pass it through `to_torch`, which waits) before writing to `x`. Use
`copy=True` where that cannot be promised. On GPUs both frameworks' streams are ordered by the DLPack exchange itself.

**Trees.** Every JAX pytree is accepted: dict, list, tuple, namedtuple, registered classes. `None` stays `None`.
Python numbers and strings beside an array pass through unchanged (they are settings, such as a step count); a tree
with numbers and no array at all is a mistake and raises. A class of one twin package becomes the class of the same
name in the other: `torch_power.PowerState` to `jax_power.PowerState` and back.

Importing this module imports neither framework; calling a function in it needs both.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    import jax
    import torch

Copy = Literal[True, False] | None

DTYPES = frozenset(
    "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex64 complex128 "
    "float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu".split()
)
"""The element types that both frameworks have, by the name that both give them."""

_TWINS = {"jax_power": "torch_power", "torch_power": "jax_power"}
_PYTHON_SETTINGS = (bool, int, float, complex, str)


def to_torch(tree: Any, *, copy: Copy = None, device: torch.device | str | None = None) -> Any:
    """JAX arrays to PyTorch tensors: one array, or every array of a tree.

    The tensors have the arrays' shapes and dtypes and `requires_grad=False`; use `bridge.autograd` for gradients.
    They share the arrays' memory unless `copy=True` or the device changes: writing to such a tensor in place changes
    the JAX array.

    Args:
      tree: a `jax.Array`, or a pytree of them.
      copy: None shares where possible, True always copies, False raises where sharing is impossible (another device).
      device: where the tensors shall be; None leaves each where its array is.
    Returns:
      The same tree with a `torch.Tensor` for each array.
    Raises:
      TypeError: a leaf is not a concrete JAX array (NumPy array, torch tensor, tracer, PRNG key), or PyTorch lacks
        its dtype.
      ValueError: a leaf is deleted or spread over several devices, `device` is not available, or `copy=False` cannot
        hold.
    """
    _check_copy("to_torch", copy)
    target = None if device is None else _torch_device(device)
    return _map("to_torch", tree, lambda where, leaf: array_to_torch(where, leaf, copy, target))


def to_jax(tree: Any, *, copy: Copy = None, device: jax.Device | str | None = None) -> Any:
    """PyTorch tensors to JAX arrays: one tensor, or every tensor of a tree.

    The arrays share the tensors' memory where DLPack and XLA allow it: dense tensors in any order of dimensions (also
    transposed, also channels-last), on the same device and aligned to what XLA needs (64 bytes on CPU). With
    `copy=None` everything else is copied: slices with gaps, `expand`, unaligned offsets, conjugate or negative views.

    Args:
      tree: a `torch.Tensor`, or a pytree of them.
      copy: None shares where possible, True always copies, False raises where sharing is impossible.
      device: where the arrays shall be, as a `jax.Device` or as "cpu", "cuda", "cuda:1"; None leaves each where its
        tensor is.
    Returns:
      The same tree with a `jax.Array` for each tensor.
    Raises:
      TypeError: a leaf is not an ordinary dense tensor (NumPy array, JAX array, sparse, quantised, nested, inside a
        `torch.func` transform), or JAX lacks its dtype.
      ValueError: a leaf requires grad, has no memory, or is 64-bit while JAX's x64 mode is off; `device` is not
        available; or `copy=False` cannot hold.
    """
    _check_copy("to_jax", copy)
    target = None if device is None else _jax_device(device)
    return _map("to_jax", tree, lambda where, leaf: tensor_to_jax(where, leaf, copy, target))


def array_to_torch(where: str, x: Any, copy: Copy = None, device: torch.device | None = None) -> torch.Tensor:
    """One array, as `to_torch`; `where` is what messages call it."""
    import jax
    import torch

    _check_array(where, x)
    home = next(iter(x.devices()))
    on_gpu = home.platform in ("gpu", "cuda", "rocm")
    if not (home.platform == "cpu" or (on_gpu and torch.cuda.is_available())):
        # PyTorch cannot address this memory at all; going through the host is the only way.
        if device is None or copy is False:
            raise ValueError(
                f"{where} is on {home}, which this PyTorch cannot use; pass device='cpu' and copy=None to copy it "
                "to the host"
            )
        x = jax.device_put(x, jax.devices("cpu")[0])
    shared = torch.utils.dlpack.from_dlpack(x)
    if device is not None and shared.device != device:
        if copy is False:
            raise ValueError(f"{where} is on {home}, so copy=False cannot put it on {device}")
        return shared.to(device)
    return shared.clone() if copy else shared


def _check_array(where: str, x: Any) -> None:
    """Raises unless `x` is a concrete JAX array in one piece with a dtype that PyTorch has."""
    import jax
    import torch

    if isinstance(x, jax.core.Tracer):
        raise TypeError(
            f"{where} is a JAX tracer: it has no values inside jit, grad or vmap; to call PyTorch there, wrap the "
            "function with bridge.autograd.torch_to_jax"
        )
    if not isinstance(x, jax.Array):
        raise TypeError(f"{where} must be a jax.Array, got {_describe(x, 'to_torch')}")
    if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{where} is a PRNG key ({x.dtype}); pass jax.random.key_data(x) for its bits")
    name = str(x.dtype)
    if name not in DTYPES or not hasattr(torch, name):
        raise TypeError(f"{where} has dtype {name}, which PyTorch lacks; convert it with x.astype first")
    if x.is_deleted():
        raise ValueError(f"{where} has been deleted (donated to a jitted function, or x.delete() was called)")
    if len(x.sharding.device_set) > 1:
        raise ValueError(
            f"{where} is spread over {len(x.sharding.device_set)} devices; pass x.addressable_data(i) for one piece, "
            "or gather it with jax.device_put(x, device) first"
        )


def tensor_to_jax(where: str, x: Any, copy: Copy = None, device: jax.Device | None = None) -> jax.Array:
    """One tensor, as `to_jax`; `where` is what messages call it."""
    import jax

    _check_tensor(where, x)
    home, copied = _home_device(x), False
    if home is None:
        if device is None or copy is False:
            raise ValueError(
                f"{where} is on {x.device}, which this JAX cannot use (it has {_platforms()}); pass device='cpu' and "
                "copy=None to copy it to the host, or install JAX for that device"
            )
        x, home, copied = x.cpu(), jax.devices("cpu")[0], True
    if copy is False:
        _check_shareable(where, x, home, device)

    source = x.detach()
    if (copy and not copied) or x.is_conj() or x.is_neg() or not _is_dense(x):
        source = _dense_copy(source)
    array = jax.dlpack.from_dlpack(source)
    # XLA quietly copies what it finds unaligned, and the limit differs between devices: only the pointer tells.
    if copy is False and source.numel() and array.unsafe_buffer_pointer() != source.data_ptr():
        raise ValueError(
            f"{where} starts at address {source.data_ptr():#x} (storage offset {source.storage_offset()}), which XLA "
            "finds unaligned, so copy=False cannot share it; pass copy=None, or a tensor that starts at a multiple of "
            "64 bytes"
        )
    return array if device in (None, home) else jax.device_put(array, device)


def _check_tensor(where: str, x: Any) -> None:
    """Raises unless `x` is an ordinary tensor with values, outside autograd, with a dtype that JAX keeps."""
    import jax
    import torch

    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{where} must be a torch.Tensor, got {_describe(x, 'to_jax')}")
    if x.is_nested:
        raise TypeError(f"{where} is a nested tensor; pass its pieces, x.unbind()")
    if x.is_quantized:
        raise TypeError(f"{where} is quantised; pass x.dequantize() or x.int_repr()")
    if x.layout != torch.strided:
        raise TypeError(f"{where} has layout {x.layout}, and JAX arrays are dense; pass x.to_dense()")
    if type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(
            f"{where} is a {type(x).__name__}, which has no memory of its own; pass the plain tensor that it wraps"
        )
    if x.device.type == "meta":
        raise ValueError(f"{where} is on the meta device: it has a shape but no values")
    try:
        x.data_ptr()
    except RuntimeError as error:
        raise TypeError(
            f"{where} has no memory: it is inside torch.func.vmap, torch.func.grad or a trace; to call JAX there, wrap "
            "the function with bridge.autograd.jax_to_torch"
        ) from error
    name = str(x.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise TypeError(f"{where} has dtype {name}, which JAX lacks; convert it with x.to first")
    if str(jax.dtypes.canonicalize_dtype(name)) != name:
        raise ValueError(
            f"{where} has dtype {name} while JAX is in 32-bit mode, which would narrow it; call "
            f'jax.config.update("jax_enable_x64", True) before any JAX work, or pass a 32-bit tensor'
        )
    if x.requires_grad:
        raise ValueError(
            f"{where} requires grad, which a JAX array cannot carry; pass x.detach(), or wrap the JAX function with "
            "bridge.autograd.jax_to_torch to differentiate through it"
        )


def _check_shareable(where: str, x: torch.Tensor, home: jax.Device, device: jax.Device | None) -> None:
    """Raises where `copy=False` cannot hold for a reason that is visible before the exchange."""
    if device not in (None, home):
        reason = f"is on {home}, not on {device}"
    elif x.is_conj():
        reason = "is a conjugate view (resolve_conj() makes the values)"
    elif x.is_neg():
        reason = "is a negative view (resolve_neg() makes the values)"
    elif not _is_dense(x):
        layout = f"shape {tuple(x.shape)} and strides {x.stride()}"
        reason = f"has {layout}, and JAX arrays have no gaps or overlaps (contiguous() copies)"
    else:
        return
    raise ValueError(f"{where} {reason}, so copy=False cannot share it; pass copy=None to copy")


def _is_dense(x: torch.Tensor) -> bool:
    """Whether the elements fill one block of memory, each once, in some order of the dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1):
        if stride != expected:
            return x.numel() == 0
        expected *= size
    return True


def _dense_copy(x: torch.Tensor) -> torch.Tensor:
    """New, row-major memory with the values of `x`, conjugation and sign worked in."""
    import torch

    return x.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def _home_device(x: torch.Tensor) -> jax.Device | None:
    """The JAX device that owns the memory of `x`; None if this JAX has no such device."""
    import jax

    try:
        if x.device.type == "cpu":
            return jax.local_devices(backend="cpu")[0]
        if x.device.type == "cuda":
            return next(d for d in jax.local_devices(backend="gpu") if d.local_hardware_id == x.device.index)
    except (RuntimeError, StopIteration):
        return None
    return None


def _torch_device(device: torch.device | str) -> torch.device:
    """`device` with its index filled in, checked to exist."""
    import torch

    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        available = "cpu" + "".join(f", cuda:{i}" for i in range(torch.cuda.device_count()))
        raise ValueError(f"to_torch: device={device!r} is not available to PyTorch, which has {available}") from error


def _jax_device(device: jax.Device | str) -> jax.Device:
    """A `jax.Device` from itself or from "platform" or "platform:index", checked to exist."""
    import jax

    if isinstance(device, jax.Device):
        return device
    platform, _, index = str(device).partition(":")
    try:
        return jax.local_devices(backend=platform)[int(index or 0)]
    except (RuntimeError, IndexError, ValueError) as error:
        raise ValueError(f"to_jax: device={device!r} is not available to JAX, which has {_platforms()}") from error


def _platforms() -> str:
    import jax

    return ", ".join(str(d) for d in jax.local_devices())


def _map(function: str, tree: Any, convert: Callable[[str, Any], Any]) -> Any:
    """Applies `convert(where, leaf)` to the leaves of `tree`, and turns each twin class into its counterpart."""
    import jax

    def is_leaf(x: Any) -> bool:
        return _is_numpy(x) or _counterpart(x) is not None

    def is_setting(x: Any) -> bool:
        return isinstance(x, _PYTHON_SETTINGS) and not _is_numpy(x)

    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    has_array = not all(is_setting(leaf) for _, leaf in leaves)

    def visit(path: Any, leaf: Any) -> Any:
        twin = _counterpart(leaf)
        if twin is not None:
            # The two classes name their fields alike, so the fields of one are the arguments of the other.
            fields = ((name, getattr(leaf, name)) for name in _field_names(type(leaf)))
            key = jax.tree_util.GetAttrKey
            return twin(**{name: None if x is None else visit((*path, key(name)), x) for name, x in fields})
        if has_array and is_setting(leaf):
            return leaf
        return convert(f"{function}: {'leaf x' + jax.tree_util.keystr(path) if path else 'x'}", leaf)

    return jax.tree_util.tree_unflatten(structure, [visit(path, leaf) for path, leaf in leaves])


def _counterpart(x: Any) -> type | None:
    """The class of the same name in the other twin package, None for anything else."""
    package = type(x).__module__.partition(".")[0]
    if package not in _TWINS or not _field_names(type(x)):
        return None
    return getattr(importlib.import_module(_TWINS[package]), type(x).__name__, None)


def _field_names(cls: type) -> tuple[str, ...]:
    """The fields of a namedtuple or dataclass, in order; empty for any other class."""
    return tuple(getattr(cls, "_fields", ()) or getattr(cls, "__dataclass_fields__", ()))


def _is_numpy(x: Any) -> bool:
    # By name of the defining package, since NumPy scalars of ml_dtypes and np.float64 (a Python float) count as well.
    return any(cls.__module__.partition(".")[0] in ("numpy", "ml_dtypes") for cls in type(x).__mro__)


def _describe(x: Any, function: str) -> str:
    """What `x` is, and what to call instead."""
    directly = "torch.as_tensor(x)" if function == "to_torch" else "jax.numpy.asarray(x)"
    package = type(x).__module__.partition(".")[0]
    if _is_numpy(x):
        return f"a NumPy {type(x).__name__}; call {directly}, no bridge is needed"
    if isinstance(x, _PYTHON_SETTINGS):
        return f"the Python {type(x).__name__} {x!r} and no array beside it; call {directly}"
    if function == "to_torch" and package == "torch":
        return "a torch.Tensor already; to_jax goes the other way"
    if function == "to_jax" and package in ("jax", "jaxlib"):
        return "a jax.Array already; to_torch goes the other way"
    return f"{type(x).__module__}.{type(x).__qualname__}, which is neither an array nor a registered pytree"


def _check_copy(function: str, copy: Any) -> None:
    if copy is not None and not isinstance(copy, bool):
        raise ValueError(
            f"{function}: copy={copy!r} must be None (share if possible), True (copy) or False (never copy)"
        )
