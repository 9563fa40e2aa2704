"""What power attention must do whatever the numbers: invariances, found by Hypothesis over shapes and options."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge import cases, twins

# Not compiled as a whole: then programs are shared by all dtypes that are computed in float32, and by calls alike.
JAX = twins.JaxTwin(jit=False)
TWINS_HERE = twins.present(JAX)

TWINS = pytest.mark.parametrize("twin", TWINS_HERE, ids=lambda twin: twin.framework)
FORMS = st.sampled_from(["attention", "chunked", "recurrent"])
# JAX compiles every new shape: a few examples a law, drawn anew for each twin.
EXAMPLES = settings(max_examples=6)


def run(twin, case, arrays, dtype="float64", forward_only=False, **options):
    with twin.scope(dtype):
        prepared = twin.prepare_power(arrays, case.options() | options, None)
        results = prepared.forward() if forward_only else prepared.forward_backward()
        return {name: twin.numpy(x) for name, x in results.items()}


def assert_close(got, want, bound=1e-11):
    assert got.keys() == want.keys()
    cases.assert_within(
        {name: cases.relative_error(got[name], x) for name, x in want.items()}, dict.fromkeys(want, bound)
    )


@st.composite
def drawn(draw, **fixed):
    case = cases.Case(
        "drawn", b=draw(st.integers(1, 2)), t=draw(st.integers(2, 40)), h_q=2 * draw(st.integers(1, 2)), h_kv=2,
        d=8, e=draw(st.integers(1, 9)), deg=2, gates=draw(st.sampled_from([None, "mild", "mixed"])),
    )  # fmt: skip
    return dataclasses.replace(case, **fixed)


@TWINS
@EXAMPLES
@given(case=drawn(), form=FORMS, factor=st.sampled_from([1e-30, -3e-5, 0.3, -7.0, 1e20]))
def test_scale_of_queries_cancels(twin, case, form, factor):
    arrays = case.make("float32")
    scaled = {**arrays, "q": arrays["q"] * np.float32(factor)}
    got, want = (run(twin, case, x, "float32", forward_only=True, form=form) for x in (scaled, arrays))
    assert_close(got, want, 1e-6)


@TWINS
@EXAMPLES
@given(
    case=drawn(), form=FORMS, dtype=st.sampled_from(["float32", "float64"]), exponent=st.integers(-50, 50),
    of_k=st.booleans(), deg=st.sampled_from([2, 4]),
)  # fmt: skip
def test_powers_of_two_change_no_bit(twin, case, form, dtype, exponent, of_k, deg):
    case = dataclasses.replace(case, deg=deg)
    arrays, name = case.make(dtype), "k" if of_k else "q"
    exponent = exponent // deg if of_k else exponent
    scaled = {**arrays, name: np.ldexp(arrays[name], exponent)}
    got, want = (run(twin, case, x, dtype, forward_only=True, form=form)["y"] for x in (scaled, arrays))
    np.testing.assert_array_equal(got, want)


@TWINS
@EXAMPLES
@given(case=drawn(), form=FORMS, data=st.data())
def test_splitting_anywhere(twin, case, form, data):
    """Outputs, final state and gradients of one call, of two calls with the state passed on between them."""
    case = dataclasses.replace(case, return_state=True)
    cut, arrays = data.draw(st.integers(0, case.t)), case.make("float64")
    whole = run(twin, case, arrays, form=form)

    def piece(start, stop, **more):
        return {n: x[:, start:stop] for n, x in arrays.items() if n not in ("ds", "dz")} | more

    state = {name: np.zeros_like(arrays[f"d{name}"]) for name in ("s", "z")}
    zero_upstream = {"ds": state["s"], "dz": state["z"]}
    first = run(twin, case, piece(0, cut, **zero_upstream), form=form, forward_only=True)
    last = piece(cut, case.t, s0=first["s"], z0=first["z"], ds=arrays["ds"], dz=arrays["dz"])
    last = run(twin, dataclasses.replace(case, initial_state=True), last, form=form)
    first = run(twin, case, piece(0, cut, ds=last.pop("ds0"), dz=last.pop("dz0")), form=form)
    joined = {n: np.concatenate((first[n], last[n]), 1) for n in whole if n not in ("s", "z")}
    assert_close(joined | {"s": last["s"], "z": last["z"]}, whole)


@TWINS
@EXAMPLES
@given(case=drawn(), form=FORMS)
def test_grouped_heads_are_repeated_heads(twin, case, form):
    arrays = case.make("float64")
    group = case.h_q // case.h_kv
    repeated = {n: np.repeat(x, group, 2) if n in ("k", "v", "log_g") else x for n, x in arrays.items()}
    got = run(twin, case, arrays, form=form)
    want = run(twin, dataclasses.replace(case, h_kv=case.h_q), repeated, form=form)
    for name in ("dk", "dv", "dlog_g"):
        if name in want:
            shape = want[name].shape
            want[name] = want[name].reshape(*shape[:2], case.h_kv, group, *shape[3:]).sum(3)
    assert_close(got, want)


@TWINS
@EXAMPLES
@given(case=drawn(), form=FORMS, data=st.data())
def test_later_tokens_change_nothing(twin, case, form, data):
    arrays, cut = case.make("float64"), data.draw(st.integers(1, case.t))
    prefix = {n: x[:, :cut] for n, x in arrays.items()}
    got = run(twin, case, prefix, form=form, forward_only=True)["y"]
    want = run(twin, case, arrays, form=form, forward_only=True)["y"][:, :cut]
    assert cases.relative_error(got, want) < 1e-12


@TWINS
@EXAMPLES
@given(case=drawn(), sizes=st.tuples(st.integers(1, 50), st.integers(1, 50)))
def test_chunk_length_does_not_matter(twin, case, sizes):
    arrays = case.make("float64")
    assert_close(*(run(twin, case, arrays, form="chunked", chunk_size=size) for size in sizes))


@TWINS
@EXAMPLES
@given(case=drawn(causal=False, gates=None), form=FORMS, seed=st.integers(0, 9))
def test_order_of_keys_without_mask(twin, case, form, seed):
    arrays = case.make("float64")
    order = np.random.default_rng(seed).permutation(case.t)
    shuffled = {**arrays, "k": arrays["k"][:, order], "v": arrays["v"][:, order]}
    got, want = (run(twin, case, x, form=form) for x in (shuffled, arrays))
    assert_close(got, want | {name: want[name][:, order] for name in ("dk", "dv")})


@TWINS
@pytest.mark.parametrize("form", ["attention", "chunked", "recurrent"])
def test_row_without_weight_gives_zero(twin, form):
    """A query of zeros, and one that is orthogonal to its only key, give 0 and receive gradient 0; others are untouched."""
    case = cases.Case("no_weight", t=12, d=8, e=4)
    arrays = case.make("float64")
    arrays["q"][:, 5] = 0.0
    arrays["k"][:, 0, :, 4:] = 0.0
    arrays["q"][:, 0, :, :4] = 0.0
    got, want = run(twin, case, arrays, form=form), case.exact(arrays)
    for name in ("y", "dq"):
        np.testing.assert_array_equal(got[name][:, [0, 5]], 0.0)
    assert_close(got, want)
