"""The table of named attention calls that tests, validation and benchmarks share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from bridge import cases, oracle_sdpa

TWINS = ("jax", "torch")


@dataclasses.dataclass(frozen=True)
class SdpaCase:
    """Scaled dot-product attention on random inputs: q and k normal with deviation `std`, v normal.

    `bias` and `mask` name the axes, of "bhts", along which that operand varies; the others have size 1. A mask hides
    three keys in ten, and every key from the queries in `hidden_rows`. `cancelling` names gradients whose exact value
    is 0 but for cancellation, so that only an error relative to dy means anything. `strided` asks for operands that are
    views, not contiguous and at an unaligned offset.
    """

    name: str
    b: int = 1
    t: int = 40
    s: int | None = None
    h_q: int = 2
    h_kv: int = 2
    d: int = 16
    e: int = 16
    scale: float | None = None
    causal: bool = False
    window: tuple[int, int] | None = None
    bias: str | None = None
    mask: str | None = None
    hidden_rows: tuple[int, ...] = ()
    query_lengths: tuple[int, ...] | None = None
    key_lengths: tuple[int, ...] | None = None
    dropout_p: float = 0.0
    std: float = 1.0
    strided: bool = False
    cancelling: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16", "float16")

    @property
    def twins(self) -> tuple[str, ...]:
        """The packages whose function can express this call."""
        only_jax = self.query_lengths is not None or self.key_lengths is not None
        only_jax |= self.causal and (self.bias is not None or self.mask is not None)
        only_jax |= self.bias is not None and self.mask is not None
        return tuple(twin for twin in TWINS if not (only_jax if twin == "torch" else self.dropout_p > 0))

    @property
    def keys(self) -> int:
        return self.t if self.s is None else self.s

    def make(self, dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
        """Inputs `q k v [bias] [mask] [query_lengths] [key_lengths] [seed]` and `dy`, all floating ones in `dtype`.

        q `[b, t, h_q, d]`, k and v `[b, s, h_kv, ·]`, bias and mask `[b, h_q, t, s]`, dy `[b, t, h_q, e]`.
        """
        rng = np.random.default_rng([seed, *self.name.encode()])
        sizes = {"b": self.b, "h": self.h_q, "t": self.t, "s": self.keys}
        arrays: dict[str, np.ndarray] = {
            "q": self.std * rng.standard_normal((self.b, self.t, self.h_q, self.d)),
            "k": self.std * rng.standard_normal((self.b, self.keys, self.h_kv, self.d)),
            "v": rng.standard_normal((self.b, self.keys, self.h_kv, self.e)),
            "dy": rng.standard_normal((self.b, self.t, self.h_q, self.e)),
        }
        if self.bias is not None:
            arrays["bias"] = rng.standard_normal([n if axis in self.bias else 1 for axis, n in sizes.items()])
        arrays = {name: x.astype(cases.NUMPY_DTYPES[dtype]) for name, x in arrays.items()}
        if self.mask is not None:
            arrays["mask"] = rng.random([n if axis in self.mask else 1 for axis, n in sizes.items()]) < 0.7
            arrays["mask"][:, :, list(self.hidden_rows)] = False
        for name in ("query_lengths", "key_lengths"):
            if getattr(self, name) is not None:
                arrays[name] = np.array(getattr(self, name), np.int32)
        if self.dropout_p > 0:
            arrays["seed"] = rng.integers(2**63 - 1, size=self.b)
        return {name: _strided(x) if self.strided else x for name, x in arrays.items()}

    def exact(self, arrays: Mapping[str, np.ndarray], empty_rows: str) -> dict[str, np.ndarray]:
        """The oracle's results on `arrays`, by name: y lse dq dk dv [dbias]; `empty_rows` as in `oracle_sdpa.sdpa`."""
        operands = [arrays.get(name) for name in ("q", "k", "v", "bias", "mask")]
        options: dict[str, Any] = {name: arrays[name] for name in ("query_lengths", "key_lengths") if name in arrays}
        options |= {"scale": self.scale, "causal": self.causal, "window": self.window, "empty_rows": empty_rows}
        if self.dropout_p > 0:
            size = (self.h_q, self.t, self.keys)
            options["gains"] = oracle_sdpa.dropout_gains(arrays["seed"], *size, self.dropout_p)
        want = oracle_sdpa.sdpa(*operands, **options)._asdict()
        want |= oracle_sdpa.sdpa_grads(*operands, dy=arrays["dy"], **options)._asdict()
        return {name: x for name, x in want.items() if x is not None}


def _strided(x: np.ndarray) -> np.ndarray:
    """The same values as a view with gaps between elements, starting one element into its buffer."""
    room = np.zeros((*x.shape[:-1], 2 * x.shape[-1] + 1), x.dtype)
    view = room[..., 1::2]
    view[...] = x
    return view


# Dtypes of a case whose results are so few, or so small, that rounding them once to 16 bits may cost more than the
# bound.
WIDE = ("float64", "float32")

SDPA = (
    SdpaCase("plain", b=2),
    SdpaCase("causal", b=2, t=37, causal=True),
    SdpaCase("causal_more_queries", t=50, s=33, causal=True),
    SdpaCase("causal_more_keys", t=33, s=50, causal=True),
    SdpaCase("cross", t=31, s=77, h_q=4, h_kv=4),
    SdpaCase("several_blocks", t=300, s=700, d=8, e=8),
    SdpaCase("several_blocks_causal", t=600, d=8, e=8, causal=True),
    SdpaCase("gqa", b=2, t=35, h_q=6, h_kv=2),
    SdpaCase("mqa_wide_value", t=29, h_q=4, h_kv=1, d=8, e=24, causal=True),
    SdpaCase("narrow_value", t=30, d=32, e=5),
    SdpaCase("head_13", t=19, d=13, e=7),
    SdpaCase("one_query", t=1, s=45, dtypes=WIDE),
    SdpaCase("one_key", t=9, s=1, cancelling=("dq", "dk")),
    SdpaCase("one_token", t=1, causal=True, cancelling=("dq", "dk")),
    SdpaCase("no_queries", t=0, s=8),
    SdpaCase("no_keys", t=8, s=0),
    SdpaCase("no_batch", b=0, t=5),
    SdpaCase("negative_scale", scale=-0.7),
    SdpaCase("zero_scale", scale=0.0, dtypes=WIDE),
    SdpaCase("large_scale", scale=20.0, dtypes=("float64",)),
    SdpaCase("tiny_scale", scale=1e-6, dtypes=WIDE),
    SdpaCase("large_inputs", t=64, std=8.0, dtypes=("float64", "bfloat16", "float16")),
    SdpaCase("mask", b=2, mask="bhts"),
    SdpaCase("mask_of_keys", b=2, s=51, mask="bs"),
    SdpaCase("mask_of_queries", mask="t"),
    SdpaCase("mask_hides_rows", b=2, h_q=4, h_kv=2, mask="hts", hidden_rows=(0, 7, 39)),
    SdpaCase("mask_hides_all", t=5, mask="ts", hidden_rows=(0, 1, 2, 3, 4)),
    SdpaCase("mask_several_blocks", t=300, s=530, d=8, e=8, mask="ts", hidden_rows=(3, 299)),
    SdpaCase("bias", b=2, h_q=4, h_kv=2, bias="bhts"),
    SdpaCase("bias_of_heads", b=2, s=51, bias="hts"),
    SdpaCase("bias_of_keys", b=2, s=400, bias="bs"),
    SdpaCase("bias_of_queries", b=2, bias="ht", cancelling=("dbias",)),
    SdpaCase("bias_several_blocks", t=300, s=530, d=8, e=8, bias="ts"),
    SdpaCase("bias_and_mask", b=2, bias="hts", mask="bts", hidden_rows=(5,)),
    SdpaCase("causal_mask", b=2, mask="bs", causal=True),
    SdpaCase("causal_bias", bias="hts", causal=True),
    SdpaCase("window", t=60, window=(5, 3)),
    SdpaCase("window_causal", t=60, window=(7, 0), causal=True),
    SdpaCase("window_leaves_rows_empty", t=60, s=20, window=(4, 2)),
    SdpaCase("window_ahead", t=30, window=(-2, 9)),
    SdpaCase("window_several_blocks", t=700, d=8, e=8, window=(100, 30)),
    SdpaCase("lengths", b=3, t=20, s=30, query_lengths=(20, 7, 0), key_lengths=(11, 30, 4)),
    SdpaCase("key_lengths", b=3, t=20, s=30, key_lengths=(1, 0, 29), causal=True),
    SdpaCase("everything", b=2, t=45, h_q=4, h_kv=2, d=8, e=12, scale=0.3, causal=True, window=(9, 9), bias="hts",
             mask="bhts", hidden_rows=(4,), query_lengths=(40, 45), key_lengths=(45, 20)),
    SdpaCase("dropout", b=2, t=33, s=43, h_q=4, h_kv=2, dropout_p=0.3),
    SdpaCase("dropout_causal", t=300, d=8, e=8, causal=True, dropout_p=0.1),
    SdpaCase("dropout_bias", t=20, s=30, bias="ts", dropout_p=0.5),
    SdpaCase("dropout_of_all", t=20, dropout_p=1.0),
    SdpaCase("strided", b=2, t=35, h_q=4, h_kv=2, mask="ts", strided=True),
    SdpaCase("strided_bias", b=2, t=35, bias="bhts", strided=True),
    SdpaCase("head_64", t=200, d=64, e=64, causal=True),
)  # fmt: skip

BY_NAME = {case.name: case for case in SDPA}


def bounds(dtype: str, implementation: str) -> dict[str, float]:
    """Relative L2 bound of every result, by name: the contract's section 6, lse held to y's and dbias to dq's bound."""
    of_power = cases.bounds(dtype, implementation)
    return {"y": of_power["y"], "lse": of_power["y"]} | dict.fromkeys(("dq", "dk", "dv", "dbias"), of_power["dq"])
