"""What the kernels for Hopper GPUs take, and which form they are given."""

from __future__ import annotations

import numpy as np
import pytest

from bridge import hopper, spec


def checked(t: int, d: int, gates: bool, **options) -> spec.PowerCall:
    x = np.zeros((1, t, 1, d), np.float16)
    return spec.check_power(x, x, x, np.zeros((1, t, 1), np.float32) if gates else None, **options)


@pytest.mark.parametrize("size,gates", list(hopper.CROSSING))
def test_form_left_open(size, gates):
    crossing = hopper.CROSSING[size, gates]
    assert hopper.plan(checked(crossing - 1, size, gates)).form == "attention"
    assert hopper.plan(checked(crossing, size, gates)).form == "chunked"
    assert hopper.plan(checked(crossing, size, gates, form="attention")).form == "attention"


@pytest.mark.parametrize("options", [{"deg": 4}, {"causal": False}])
def test_what_the_chunked_kernels_lack_takes_the_attention_form(options):
    assert hopper.plan(checked(32768, 64, False, **options)).form == "attention"
    assert hopper.chunked_lacks(checked(64, 64, False, **options), "cuda") is not None


def test_limits_are_named():
    told = hopper.chunked_lacks(checked(8, 128, False), "cuda", largest=64)
    assert told is not None and told.endswith("multiples of 8 up to 64")
    assert hopper.chunked_lacks(checked(8, 128, False), "cuda") is None
    assert "device cpu" in str(hopper.attention_lacks(checked(8, 64, False, form="attention"), "cpu"))
