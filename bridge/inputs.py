"""Inputs that nobody made up: real text as q, k, v, log_g, and tensors from the user's own files.

The recipe for text, the same on every machine that has the same text:

    x = bytes of the standard library's own source, its top-level files in alphabetical order
    u = E[x],  E [256, 32] normal
    q, k, v = u W_q, u W_k, u W_v, unit variance; then q and k are turned by rotary positions, base 10000
    log_g = log σ(u w_g + c_h),  c_h from 2 to 6 over the heads

E and every W come from NumPy's frozen `RandomState` stream and are rounded to multiples of 2^-8 and 2^-10, sines and
cosines to multiples of 2^-20: so every product and every sum is exact in float64, and neither the order in which a
library adds nor the last bit of its sine can change the result.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
import sysconfig
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors

from bridge import cases, cases_sdpa, oracle_sdpa, spec

EMBEDDING = 32
ROTARY_BASE = 10000.0
TEXT_LENGTHS = (256, 1024, 2048, 4096, 16384)

_SAFETENSORS_DTYPES = {
    "F16": np.dtype(np.float16),
    "BF16": cases.NUMPY_DTYPES["bfloat16"],
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}


class InputError(ValueError):
    """A file that cannot be used; the message is one line that names the file, the tensor and what was expected."""


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def text(length: int) -> bytes:
    """The first `length` bytes of the standard library's source: top-level modules in alphabetical order.

    Raises:
      InputError: this Python has less source than that (an installation without its `.py` files).
    """
    folder, found = pathlib.Path(sysconfig.get_path("stdlib")), b""
    for path in sorted(folder.glob("*.py")):
        if len(found) >= length:
            break
        found += path.read_bytes()
    if len(found) < length:
        raise InputError(f"{folder}: {len(found)} bytes of Python source, {length} are needed")
    return found[:length]


@functools.cache
def _tables(h_q: int, h_kv: int, d: int, e: int, seed: int) -> dict[str, np.ndarray]:
    """What each byte becomes: exact q `[256, h_q, d]`, k `[256, h_kv, d]`, v `[256, h_kv, e]`; log_g `[256, h_kv]`."""
    rng = np.random.RandomState(seed)
    embedding = _grid(rng.standard_normal((256, EMBEDDING)), 8)
    tables = {}
    for name, heads, size in (("q", h_q, d), ("k", h_kv, d), ("v", h_kv, e), ("log_g", h_kv, 1)):
        projection = _grid(rng.standard_normal((EMBEDDING, heads * size)) / np.sqrt(EMBEDDING), 10)
        tables[name] = (embedding @ projection).reshape(256, heads, size)
    gate = tables["log_g"][..., 0] + np.linspace(2.0, 6.0, h_kv)
    return tables | {"log_g": -np.logaddexp(0.0, -gate)}


def _grid(x: np.ndarray, bits: int) -> np.ndarray:
    """`x` rounded to multiples of 2^-bits."""
    return np.round(x * 2.0**bits) / 2.0**bits


def rotate(x: np.ndarray) -> np.ndarray:
    """Rotary positions (Su et al., 2021) on `[b, t, h, d]`: coordinates i and i + d/2 turned by t · 10000^(−2i/d)."""
    t, half = x.shape[1], x.shape[-1] // 2
    angle = np.arange(t)[:, None] * ROTARY_BASE ** (-np.arange(half) / half)
    cos, sin = (_grid(f(angle), 20)[:, None] for f in (np.cos, np.sin))
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], -1)


def from_text(
    source: bytes, *, b: int = 1, h_q: int = 4, h_kv: int = 2, d: int = 64, e: int = 64, seed: int = 0
) -> dict[str, np.ndarray]:
    """The recipe above on `source`, cut into `b` equal pieces: float64 `q k v log_g`."""
    tokens = np.frombuffer(source, np.uint8).reshape(b, -1)
    arrays = {name: table[tokens] for name, table in _tables(h_q, h_kv, d, e, seed).items()}
    return arrays | {"q": rotate(arrays["q"]), "k": rotate(arrays["k"])}


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes and bytes, its first 16 hex digits: equal where two machines made the same inputs."""
    found = hashlib.sha256()
    for name, x in sorted(arrays.items()):
        found.update(f"{name} {x.dtype} {x.shape}".encode())
        found.update(np.ascontiguousarray(x).tobytes())
    return found.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def load(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """`q k v [log_g]` from one `.safetensors` or `.npz` file, checked as `power_attention` checks its arguments.

    Raises:
      InputError: missing, truncated, of another kind, with tensors missing or unknown, of wrong shapes or dtypes, or
        not finite.
    """
    path = pathlib.Path(path)
    readers = {".safetensors": _read_safetensors, ".npz": _read_npz}
    if path.suffix not in readers:
        raise InputError(f"{path}: expected a file ending in .safetensors or .npz")
    if not path.is_file():
        raise InputError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        arrays = readers[path.suffix](path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {_one_line(error)}") from error
    missing = [name for name in ("q", "k", "v") if name not in arrays]
    unknown = sorted(set(arrays) - {"q", "k", "v", "log_g"})
    if missing or unknown:
        told = f"no tensor {missing[0]!r}" if missing else f"unknown tensor {unknown[0]!r}"
        raise InputError(f"{path}: {told}; expected q, k, v and, if there are gates, log_g")
    try:
        spec.check_power(arrays["q"], arrays["k"], arrays["v"], arrays.get("log_g"), form="attention")
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {_one_line(error)}") from error
    for name, x in arrays.items():
        bad = x.size - np.count_nonzero(np.isfinite(x.astype(np.float64)))
        if bad:
            raise InputError(f"{path}: {name}: {bad} of {x.size} values are NaN or infinite")
    return arrays


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        # Opened here: NumPy leaves a file open that turns out not to be an archive.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, ValueError, EOFError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: not a whole .npz file: {_one_line(error)}") from error
    # NumPy stores bfloat16, which it does not know, as raw 2-byte records: what they meant is not in the file.
    raw = [name for name, x in arrays.items() if x.dtype.kind == "V"]
    if raw:
        raise InputError(
            f"{path}: {raw[0]}: .npz does not keep the dtype {arrays[raw[0]].dtype}; use .safetensors for bfloat16"
        )
    return arrays


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        # The library's NumPy reader knows no bfloat16, its parser does.
        tensors = dict(safetensors.deserialize(path.read_bytes()))
    except safetensors.SafetensorError as error:
        raise InputError(f"{path}: not a whole .safetensors file: {_one_line(error)}") from error
    arrays = {}
    for name, tensor in tensors.items():
        if tensor["dtype"] not in _SAFETENSORS_DTYPES:
            raise InputError(f"{path}: {name}: dtype {tensor['dtype']} is not one of {', '.join(_SAFETENSORS_DTYPES)}")
        arrays[name] = np.frombuffer(tensor["data"], _SAFETENSORS_DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
    return arrays


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# ---------------------------------------------------------------------------------------------------------------------
# Cases made of them
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GivenCase(cases.Case):
    """Power attention on given `q k v [log_g]`, rounded to the dtype asked for."""

    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def make(self, dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
        return _rounded(self.arrays, dtype) | {"dy": _upstream(self, dtype, seed)}


@dataclasses.dataclass(frozen=True)
class GivenSdpaCase(cases_sdpa.SdpaCase):
    """Causal softmax attention on given q, k, v."""

    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def make(self, dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
        qkv = {name: x for name, x in self.arrays.items() if name != "log_g"}
        return _rounded(qkv, dtype) | {"dy": _upstream(self, dtype, seed)}

    def exact(self, arrays: Mapping[str, np.ndarray], empty_rows: str) -> dict[str, np.ndarray]:
        """As of any case, but one key-value head at a time: the oracle holds the scores of all its heads at once."""
        group, heads = self.h_q // self.h_kv, []
        for head in range(self.h_kv):
            own = slice(head * group, (head + 1) * group)
            part = {name: x[:, :, own if name in ("q", "dy") else slice(head, head + 1)] for name, x in arrays.items()}
            q, k, v, dy = (part[name] for name in ("q", "k", "v", "dy"))
            found = oracle_sdpa.sdpa(q, k, v, causal=self.causal, empty_rows=empty_rows)._asdict()
            heads.append(found | oracle_sdpa.sdpa_grads(q, k, v, dy=dy, causal=self.causal, empty_rows=empty_rows)._asdict())
        return {name: np.concatenate([x[name] for x in heads], 2) for name in heads[0] if heads[0][name] is not None}


def _rounded(arrays: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """q, k, v in `dtype`, log_g in float32 (float64 for float64)."""
    low, high = cases.NUMPY_DTYPES[dtype], cases.NUMPY_DTYPES["float64" if dtype == "float64" else "float32"]
    return {name: x.astype(high if name == "log_g" else low) for name, x in arrays.items()}


def _upstream(case: Any, dtype: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, *case.name.encode()])
    return rng.standard_normal((case.b, case.t, case.h_q, case.e)).astype(cases.NUMPY_DTYPES[dtype])


def given(name: str, arrays: dict[str, np.ndarray], dtypes: tuple[str, ...]) -> tuple[GivenCase, GivenSdpaCase]:
    """Both operations as cases on the same arrays; without the forms that need a state where the head size has none."""
    (b, t, h_q, d), (_, _, h_kv, e) = arrays["q"].shape, arrays["v"].shape
    sizes: dict[str, Any] = {"b": b, "t": t, "h_q": h_q, "h_kv": h_kv, "d": d, "e": e}
    # One token at a time is no way to compute a long sequence: the recurrent form is run on short ones only.
    forms = ("attention", "chunked", "recurrent")[: 1 if d % spec.POWER_TILE[2] else 3 if t <= 256 else 2]
    gates = "given" if "log_g" in arrays else None
    one_key = ("dq", "dk", "dlog_g") if t == 1 else ()
    power = GivenCase(name, **sizes, gates=gates, cancelling=one_key, dtypes=dtypes, forms=forms, arrays=arrays)
    return power, GivenSdpaCase(name, **sizes, causal=True, cancelling=one_key[:2], dtypes=dtypes, arrays=arrays)


def text_cases(length: int) -> tuple[GivenCase, GivenSdpaCase]:
    """Both operations on the first `length` bytes of text: 4 query heads, 2 key-value heads, head size 64."""
    return given(f"text_{length}", from_text(text(length)), ("float64", "float32", "bfloat16", "float16"))
