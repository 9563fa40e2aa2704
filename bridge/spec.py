"""The contract in code: argument checks, state layout, sizes and the cost model, shared by both twins.

Nothing here imports JAX or PyTorch. Arguments are looked at only through `.shape` and `.dtype`, which NumPy, JAX and
PyTorch arrays all have, so the two packages raise the same errors with the same text.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")
FORMS = ("attention", "chunked", "recurrent")

# Side of the tiles that the state is made of. p = 2: a pair of 8-wide tiles is 64 rows, one M = 64 tile of a Hopper matrix
# instruction; larger p take smaller tiles, so that a block keeps 8 to 64 rows (8, 64, 64, 16) and padding stays small.
POWER_TILE = {1: 8, 2: 8, 3: 4, 4: 2}


# ---------------------------------------------------------------------------------------------------------------------
# State layout
# ---------------------------------------------------------------------------------------------------------------------


class StateSize(NamedTuple):
    """Size of one head's state: `rows` features as stored (in tiles), `exact_rows` distinct monomials of degree p."""

    rows: int
    exact_rows: int
    bytes: int
    exact_bytes: int


def check_degree(deg: Any, *, needs_state: bool = True) -> int:
    """Return `deg` as an int; raise unless it is an integer ≥ 1, and one with a state layout if `needs_state`."""
    if isinstance(deg, bool) or not isinstance(deg, int | np.integer):
        raise TypeError(f"deg={deg!r}: expected an integer, got {type(deg).__name__}")
    if deg < 1:
        raise ValueError(f"deg={deg}: expected an integer >= 1")
    if needs_state and deg not in POWER_TILE:
        raise ValueError(f"deg={deg}: a state is defined for deg in {tuple(POWER_TILE)}; use form='attention' without a state")
    return int(deg)


def check_head_size(d: int, deg: int) -> int:
    """Return the tile side for `deg`; raise unless it divides the head size `d`."""
    tile = POWER_TILE[check_degree(deg)]
    if d < 1 or d % tile:
        below, above = d // tile * tile, -(-d // tile) * tile
        near = f"{below} or {above}" if below else f"{max(above, tile)}"
        raise ValueError(f"head size d={d}: deg={deg} needs a multiple of {tile}, nearest usable: {near}")
    return tile


def state_rows(d: int, deg: int) -> int:
    """D = C(d/T + p − 1, p) · T^p, the rows of the state for head size `d` and degree `deg`."""
    tile = check_head_size(d, deg)
    return math.comb(d // tile + deg - 1, deg) * tile**deg


def state_size(d: int, e: int, deg: int, *, itemsize: int = 4) -> StateSize:
    """Rows and bytes of one head's state `[D, e]`, in tiles and exact.

    Args:
      d: head size of queries and keys.
      e: columns: the head size of values, plus 1 if the normaliser is counted as a column.
      deg: degree p; any p ≥ 1 has an exact size, only those in `POWER_TILE` have a layout (else `rows` counts exact rows).
      itemsize: bytes per element (states are float32 in this library: 4).
    Returns:
      `StateSize(rows, exact_rows, bytes, exact_bytes)`, with exact_rows = C(d + p − 1, p).
    Raises:
      ValueError: `deg` < 1 or `d` is not a multiple of the tile side.
    """
    exact = math.comb(d + check_degree(deg, needs_state=False) - 1, deg)
    rows = state_rows(d, deg) if deg in POWER_TILE else exact
    return StateSize(rows, exact, rows * e * itemsize, exact * e * itemsize)


@functools.cache
def tile_tuples(d: int, deg: int) -> np.ndarray:
    """Tile tuples I_1 ≤ … ≤ I_p in lexicographic order: int array `[blocks, p]`. Block n is rows n·T^p … (n+1)·T^p − 1."""
    tiles = range(d // check_head_size(d, deg))
    return np.array(list(itertools.combinations_with_replacement(tiles, deg)), dtype=np.int32).reshape(-1, deg)


@functools.cache
def block_multiplicity(d: int, deg: int) -> np.ndarray:
    """p! / Π m_r! of every block (m_r: how often tile r occurs in its tuple): float64 array `[blocks]`."""
    counts = [[np.count_nonzero(row == tile) for tile in set(row.tolist())] for row in tile_tuples(d, deg)]
    return np.array([math.factorial(deg) / math.prod(map(math.factorial, count)) for count in counts])


def sympow_multiplicity(d: int, deg: int) -> np.ndarray:
    """Multiplicity of each of the D rows of φ: ψ(x) = sympow_multiplicity(d, deg) · φ(x). Float64 array `[D]`, whole numbers.

    Raises:
      ValueError: `deg` has no state layout, or `d` is not a multiple of its tile side.
    """
    return np.repeat(block_multiplicity(d, deg), POWER_TILE[deg] ** deg)


# ---------------------------------------------------------------------------------------------------------------------
# Argument checks
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PowerCall:
    """A checked call of `power_attention`, in plain numbers: hashable, and all that an implementation needs beside arrays."""

    b: int
    t: int
    t_kv: int
    h_q: int
    h_kv: int
    d: int
    e: int
    deg: int
    scale: float
    causal: bool
    normalize: bool
    form: str
    chunk_size: int
    has_gate: bool
    has_state: bool
    return_state: bool
    dtypes: tuple[str, str, str]
    compute_dtype: str
    auto_form: bool = False
    auto_chunk_size: bool = False

    @property
    def group(self) -> int:
        """Query heads that read one key-value head."""
        return self.h_q // self.h_kv

    @property
    def rows(self) -> int:
        """State rows D; 0 when the call neither needs nor has a state."""
        return state_rows(self.d, self.deg) if self.needs_state else 0

    @property
    def needs_state(self) -> bool:
        return self.form != "attention" or self.has_state or self.return_state


def dtype_name(x: Any) -> str:
    """Name of an array's dtype, the same for NumPy, JAX and PyTorch: 'float32', 'bfloat16', …"""
    return str(x.dtype).removeprefix("torch.")


def _check_array(name: str, x: Any, axes: str) -> tuple[int, ...]:
    """Raise unless `x` is an array with as many axes as `axes` names; return its shape."""
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        raise TypeError(f"{name}: expected an array [{axes}], got {type(x).__name__}")
    if len(x.shape) != len(axes.split()):
        raise ValueError(f"{name}: expected {len(axes.split())} axes [{axes}], got shape {_shape(x)}")
    return tuple(x.shape)


def _shape(x: Any) -> str:
    return "[" + ", ".join(map(str, x.shape)) + "]"


def _check_float(name: str, x: Any, allowed: Sequence[str] = FLOAT_DTYPES) -> None:
    if dtype_name(x) not in allowed:
        raise TypeError(f"{name}: dtype {dtype_name(x)} is not one of {', '.join(allowed)}")


def _check_shape(name: str, x: Any, axes: str, expected: tuple[int, ...], why: str) -> None:
    if _check_array(name, x, axes) != expected:
        raise ValueError(f"{name}: expected shape [{', '.join(map(str, expected))}] ([{axes}], {why}), got {_shape(x)}")


def _check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}={value!r}: expected True or False, got {type(value).__name__}")
    return bool(value)


def check_scale(scale: Any, d: int) -> float:
    """Return `scale` as a float, 1/sqrt(d) for None; raise unless it is a finite real number (0 and negatives are)."""
    if scale is None:
        return 1.0 / math.sqrt(d) if d else 1.0
    if isinstance(scale, bool) or not isinstance(scale, int | float | np.integer | np.floating):
        raise TypeError(f"scale={scale!r}: expected a real number or None, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale!r}: expected a finite number")
    return float(scale)


def _check_chunk_size(chunk_size: Any) -> None:
    if chunk_size is None:
        return
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int | np.integer):
        raise TypeError(f"chunk_size={chunk_size!r}: expected an integer or None, got {type(chunk_size).__name__}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: expected an integer >= 1 or None")


def check_power(
    q: Any,
    k: Any,
    v: Any,
    log_g: Any = None,
    *,
    deg: Any = 2,
    scale: Any = None,
    causal: Any = True,
    normalize: Any = True,
    form: Any = "auto",
    chunk_size: Any = None,
    initial_state: Any = None,
    return_state: Any = False,
) -> PowerCall:
    """Check the arguments of `power_attention` and return the call in plain numbers, its form and chunk length chosen.

    Raises:
      TypeError: an argument is of the wrong kind or dtype.
      ValueError: an argument's value or shape is outside what the formula allows.
    """
    b, t, h_q, d = _check_array("q", q, "b t h_q d")
    _, t_kv, h_kv, _ = _check_array("k", k, "b t h_kv d")
    e = _check_array("v", v, "b t h_kv e")[-1]
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_float(name, x)
    causal, normalize = _check_bool("causal", causal), _check_bool("normalize", normalize)
    return_state = _check_bool("return_state", return_state)
    if d < 1:
        raise ValueError(f"q: head size d={d}, expected at least 1")
    if h_kv < 1 or h_q % h_kv:
        raise ValueError(f"q: h_q={h_q} query heads are not a multiple of h_kv={h_kv} key-value heads")
    if causal and t_kv != t:
        raise ValueError(f"k: length {t_kv} differs from q's length {t}; only causal=False allows that")
    _check_shape("k", k, "b t h_kv d", (b, t_kv, h_kv, d), "from q" if causal else "batch and head size from q")
    _check_shape("v", v, "b t h_kv e", (b, t_kv, h_kv, e), "from k")

    deg = check_degree(deg, needs_state=False)
    scale = check_scale(scale, d)
    if normalize and deg % 2:
        raise ValueError(f"deg={deg}: normalize=True needs an even degree (an odd power has no sign-definite normaliser)")
    if form not in (*FORMS, "auto"):
        raise ValueError(f"form={form!r}: expected one of {', '.join(map(repr, (*FORMS, 'auto')))}")
    _check_chunk_size(chunk_size)

    dtypes = (dtype_name(q), dtype_name(k), dtype_name(v))
    compute_dtype = "float64" if "float64" in dtypes else "float32"
    if log_g is not None:
        if not causal:
            raise ValueError("log_g: gates have no meaning with causal=False; expected None")
        _check_shape("log_g", log_g, "b t h_kv", (b, t_kv, h_kv), "from k")
        _check_float("log_g", log_g, ("float32", "float64") if compute_dtype == "float64" else ("float32",))
    has_state = initial_state is not None
    if has_state and not causal:
        raise ValueError("initial_state: has no meaning with causal=False; expected None")
    if form != "attention" and form != "auto" or has_state or return_state:
        check_head_size(d, deg)
    if has_state:
        s, z = _check_state(initial_state)
        rows = state_rows(d, deg)
        _check_shape("initial_state.s", s, "b h_kv D e", (b, h_kv, rows, e), f"D for d={d}, deg={deg}")
        _check_shape("initial_state.z", z, "b h_kv D", (b, h_kv, rows), f"D for d={d}, deg={deg}")
        for name, x in (("initial_state.s", s), ("initial_state.z", z)):
            _check_float(name, x, ("float32", "float64") if compute_dtype == "float64" else ("float32",))

    auto_form, auto_chunk_size = form == "auto", chunk_size is None
    if auto_form:
        form = choose_form(t, t_kv, d, e, deg, causal=causal, with_state=has_state or return_state)
    if auto_chunk_size:
        chunk_size = choose_chunk_size(t if causal else t_kv, d, e, deg, form)
    return PowerCall(
        b, t, t_kv, h_q, h_kv, d, e, deg, scale, causal, normalize, form, int(chunk_size),
        log_g is not None, has_state, return_state, dtypes, compute_dtype, auto_form, auto_chunk_size,
    )  # fmt: skip


def _check_state(state: Any) -> tuple[Any, Any]:
    if not isinstance(state, tuple) or len(state) != 2:
        raise TypeError(f"initial_state: expected a PowerState (s, z) or None, got {type(state).__name__}")
    return state[0], state[1]


def check_step(q: Any, k: Any, v: Any, log_g: Any) -> None:
    """Check the axes of `power_step`'s arguments, which have no time axis; the rest is checked as a sequence of length 1."""
    _check_array("q", q, "b h_q d")
    _check_array("k", k, "b h_kv d")
    _check_array("v", v, "b h_kv e")
    if log_g is not None:
        _check_array("log_g", log_g, "b h_kv")


# ---------------------------------------------------------------------------------------------------------------------
# Cost model
# ---------------------------------------------------------------------------------------------------------------------

# What making one element of φ costs beside its two products, in their operations. Set so that with p = 2, d = e = 64 the forms
# cross near t = 5800: by their times at t = 32768 on two CPU cores they do at 6100 in xla, 7400 in eager (NOTES, "Portable").
FEATURE_COST = 24.0
# Longest piece of the quadratic sum held at once by the portable implementations: 512 × 512 float32 scores are 1 MB a head.
# An estimate of what a core's cache holds; other lengths have not been timed.
ATTENTION_BLOCK = 512


def attention_cost(t: int, t_kv: int, d: int, e: int, *, causal: bool) -> float:
    """Operations per query head of the O(t²) sum: 2·(d + e) a pair of tokens, half the pairs when causal."""
    return 2.0 * (d + e) * t * t_kv * (0.5 if causal else 1.0)


def chunked_cost(t: int, t_kv: int, d: int, e: int, deg: int, chunk_size: int, *, causal: bool) -> float:
    """Operations per query head of the chunked form: 2·D·(e+1) to update, as many to query, and the sum inside chunks."""
    rows = state_rows(d, deg)
    through_state = (2.0 * (e + 1) + FEATURE_COST) * rows * (t + t_kv)
    return through_state + (attention_cost(t, min(chunk_size, t_kv), d, e, causal=True) if causal else 0.0)


def choose_form(t: int, t_kv: int, d: int, e: int, deg: int, *, causal: bool, with_state: bool) -> str:
    """The cheapest form by the two costs above. With p = 2 and d = e = 64 the forms cross near t = 5800 (causal).

    A call that has or returns a state pays for querying or updating it in either form, so the chunked one always wins there
    but for a single token, where the recurrence is the same work without a chunk's overhead.
    """
    tile = POWER_TILE.get(deg)
    if tile is None or d % tile:
        return "attention"
    if t == t_kv == 1 and causal and with_state:
        return "recurrent"
    chunk_size = choose_chunk_size(t if causal else t_kv, d, e, deg, "chunked")
    chunked = chunked_cost(t, t_kv, d, e, deg, chunk_size, causal=causal)
    return "chunked" if with_state or chunked < attention_cost(t, t_kv, d, e, causal=causal) else "attention"


def choose_chunk_size(t: int, d: int, e: int, deg: int, form: str) -> int:
    """Chunk length of the portable implementations: `t` cut into equal pieces that are no longer than suits the form.

    Features of a chunk are `chunk_size · D` numbers a head: the limit is the largest power of two that keeps them below 2^20
    (4 MB of float32), between 16 (below, matrix products degenerate) and 512 (above, the work inside a chunk dominates).
    """
    if form == "attention":
        longest = ATTENTION_BLOCK
    else:
        longest = min(512, max(16, 2 ** int(math.log2(2**20 / state_rows(d, deg)))))
    return max(1, -(-t // max(1, -(-t // longest))))


# ---------------------------------------------------------------------------------------------------------------------
# Implementations and choosing one
# ---------------------------------------------------------------------------------------------------------------------


class Implementation(NamedTuple):
    """One way to compute an operation.

    Fields:
      forward, backward: arrays in, arrays out (their signatures are those of the portable implementation).
      supports: `supports(call, device)` returns None, or the reason why it cannot serve the call.
      plan: replaces a choice that was left open (`auto_form`, `auto_chunk_size`) by what suits this implementation.
      wide_output: forward returns y in the compute dtype, not yet rounded to the dtype of v.
      saved_bytes: bytes that the forward pass can keep for the backward pass, for a call whose gradient will be wanted. Both
        then take a buffer `saved` of that size; without it the backward pass works out again what is missing, to the same bits.
      residual: forward takes `residual=True` and returns as a third array digits of y that rounding dropped; backward takes it.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    supports: Callable[[Any, str], str | None]
    plan: Callable[[Any], Any] = lambda call: call
    wide_output: bool = True
    saved_bytes: Callable[[Any], int] = lambda call: 0
    residual: bool = False


class Choice:
    """Chooses an implementation by name, by a `with` block, or the first that supports the call; never falls back silently.

    Args:
      tables: operation name → {implementation name → Implementation}, best first.
    """

    def __init__(self, tables: Mapping[str, Mapping[str, Implementation]]):
        self._tables = tables
        self._in_force: contextvars.ContextVar[tuple[str, ...] | None] = contextvars.ContextVar("implementation", default=None)

    def in_force(self) -> tuple[str, ...] | None:
        """What the innermost `implementation` block asks for; None outside of any."""
        return self._in_force.get()

    def names(self, operation: str | None = None) -> tuple[str, ...]:
        """Implementation names of one operation, best first, or of all."""
        tables = self._tables.values() if operation is None else [self._tables[operation]]
        return tuple(dict.fromkeys(name for table in tables for name in table))

    @contextlib.contextmanager
    def implementation(self, names: str | Sequence[str] | None) -> Iterator[None]:
        """Use one implementation, or the first that can of several, for every call in the block.

        Blocks nest, hold for the current thread (or task) alone, and are undone on errors. An `implementation=` argument
        at the call overrides the block; None restores the automatic choice. A compiled function keeps the choice that was
        in force when it was traced.

        Raises:
          ValueError: a name is not one of this package's implementations.
        """
        token = self._in_force.set(None if names is None else _checked_names(names, self.names()))
        try:
            yield
        finally:
            self._in_force.reset(token)

    def choose(self, operation: str, call: Any, implementation: str | Sequence[str] | None, device: str) -> str:
        """Name of the implementation that serves `call` on `device`.

        Raises:
          ValueError: `implementation` is not a name in the operation's table.
          NotImplementedError: none of those asked for can serve the call; the message gives each one's reason.
        """
        table = self._tables[operation]
        asked = implementation if implementation is not None else self.in_force()
        candidates = tuple(table) if asked is None else _checked_names(asked, tuple(table))
        reasons = {}
        for name in candidates:
            reason = table[name].supports(table[name].plan(call), device)
            if reason is None:
                return name
            reasons[name] = reason
        others = [name for name in table if name not in reasons]
        works = [name for name in others if table[name].supports(table[name].plan(call), device) is None]
        instead = f"; implementation={works[0]!r} would work" if works else ""
        told = "; ".join(f"implementation={name!r} cannot serve this call: {reason}" for name, reason in reasons.items())
        raise NotImplementedError(f"{operation}: {told}{instead}")


def _checked_names(names: Any, allowed: Sequence[str]) -> tuple[str, ...]:
    """One name or several as a tuple; raise unless there is at least one and all are among those allowed."""
    expected = f"expected one of {', '.join(map(repr, allowed))}, or None"
    if not isinstance(names, str | list | tuple):
        raise TypeError(f"implementation={names!r}: {expected}, got {type(names).__name__}")
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names or [()]:
        if name not in allowed:
            raise ValueError(f"implementation={name!r}: {expected}")
    return names
