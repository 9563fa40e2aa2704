"""The oracle of scaled dot-product attention: gradients against finite differences, known random bits, and its case
table."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

from bridge import cases, cases_sdpa, oracle_sdpa, spec_sdpa

CHECKED = (
    "causal", "causal_more_queries", "gqa", "mqa_wide_value", "negative_scale", "zero_scale", "mask_hides_rows",
    "bias", "bias_of_keys", "bias_and_mask", "window_leaves_rows_empty", "lengths", "key_lengths", "everything", "dropout",
)  # fmt: skip
STEP = 1e-6


@pytest.mark.parametrize("empty_rows", ["zero", "mean"])
@pytest.mark.parametrize("name", CHECKED)
def test_gradients_match_finite_differences(name, empty_rows):
    """Along random directions, the slope of Σ y·dy is the inner product of direction and gradient, for each operand
    alone."""
    case = cases_sdpa.BY_NAME[name]
    arrays = case.make("float64")
    gradients = case.exact(arrays, empty_rows)
    rng = np.random.default_rng(1)

    def objective(**moved):
        return float((case.exact(arrays | moved, empty_rows)["y"] * arrays["dy"]).sum())

    for operand in ("q", "k", "v", "bias"):
        if operand not in arrays:
            continue
        direction = rng.standard_normal(arrays[operand].shape)
        ahead, behind = (objective(**{operand: arrays[operand] + sign * STEP * direction}) for sign in (1, -1))
        slope = float((direction * gradients[f"d{operand}"]).sum())
        assert (ahead - behind) / (2 * STEP) == pytest.approx(slope, rel=1e-6, abs=1e-6), operand


def test_one_row_by_hand():
    """Two keys with scores 0 and log 3 get weights 1/4 and 3/4."""
    q, k = np.array([[[[1.0]]]]), np.array([[[[0.0]], [[np.log(3.0)]]]])
    v = np.array([[[[8.0]], [[4.0]]]])
    y, lse = oracle_sdpa.sdpa(q, k, v, scale=1.0)
    assert y.item() == pytest.approx(8.0 / 4 + 4.0 * 3 / 4)
    assert lse.item() == pytest.approx(np.log(4.0))


def test_visible_keys_by_hand():
    visible = oracle_sdpa.visible_keys(3, 4, causal=True, window=(1, 5), key_lengths=np.array([4, 1]))
    np.testing.assert_array_equal(visible[0, 0], [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]])
    np.testing.assert_array_equal(visible[1, 0], [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize(("empty_rows", "expected"), [("zero", 0.0), ("mean", 3.0)])
def test_empty_rows(empty_rows, expected):
    x = np.array([1.0, 5.0]).reshape(1, 2, 1, 1)
    y, lse = oracle_sdpa.sdpa(x, x, x, mask=np.array([[False, False], [True, True]])[None, None], empty_rows=empty_rows)
    assert y[0, 0, 0, 0] == expected
    assert lse[0, 0, 0] == -np.inf
    assert np.isfinite(lse[0, 1, 0])


def test_dropout_bits_are_philox():
    """The published first answer of Philox 4×32-7: counter 0 and key 0 give 5f6fb709 0d893f64 4f121f81 4f730a48.

    A weight is kept from the threshold on, so the bits of keys 0 to 3 are found by thresholds at and just above them.
    """
    for key, word in enumerate((0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)):
        at, above = (oracle_sdpa.dropout_gains(np.zeros(1), 1, 1, 4, p / 2**32)[0, 0, 0, key] for p in (word, word + 1))
        assert at > 1
        assert above == 0


def test_dropout_keeps_its_share_everywhere():
    gains = oracle_sdpa.dropout_gains(np.array([3, 2**62 + 5]), 3, 200, 201, 0.3)
    assert set(np.unique(gains)) == {0.0, 1 / 0.7}
    for axis in range(4):
        others = tuple(other for other in range(4) if other != axis)
        shares = (gains > 0).mean(others)
        deviation = np.sqrt(0.3 * 0.7 / (gains.size / gains.shape[axis]))
        assert np.abs(shares - 0.7).max() < 5 * deviation
    # Neighbours along every axis are independent: they agree as often as two coins of 0.7.
    kept = gains > 0
    for axis in range(4):
        first, second = (np.take(kept, range(n, kept.shape[axis] - 1 + n), axis) for n in (0, 1))
        assert (first == second).mean() == pytest.approx(0.7**2 + 0.3**2, abs=0.01)


@functools.cache
def rounded_errors(case: cases_sdpa.SdpaCase, dtype: str) -> dict[str, float]:
    arrays = case.make(dtype)
    exact = case.exact(arrays, "zero")
    del exact["lse"]
    rounded = {name: x.astype(cases.NUMPY_DTYPES[dtype]) for name, x in exact.items()}
    return cases.errors(rounded, exact, case, arrays["dy"])


@pytest.mark.parametrize("case", cases_sdpa.SDPA, ids=lambda case: case.name)
def test_bounds_leave_room_for_rounding_the_result(case):
    for dtype in case.dtypes:
        cases.assert_within(rounded_errors(case, dtype), cases_sdpa.bounds(dtype, "eager"), f"{case.name} {dtype}")


def test_case_names_are_distinct():
    assert len(cases_sdpa.BY_NAME) == len(cases_sdpa.SDPA)


def test_a_band_without_a_needless_window_is_the_same_band():
    """Every window on up to four queries and keys; those as wide as the sequences go."""
    for t, s, causal in itertools.product(range(5), range(5), (False, True)):
        i, j = np.arange(t)[:, None], np.arange(s)
        for left, right in itertools.product(range(-2, 6), range(-3, 6)):
            plain_causal, window = spec_sdpa.plain_band(causal, (left, right), t, s)
            low, high = window or (t, s)
            want = (i - left <= j) & (j <= i + right) & ((j <= i) | (not causal))
            assert np.array_equal((i - low <= j) & (j <= i + high) & ((j <= i) | (not plain_causal)), want)
            assert window is None or left < t - 1 or right != 0 and right < s - 1 and not (causal and right > 0)
