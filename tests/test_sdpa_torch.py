"""`torch_power.scaled_dot_product_attention` against the float64 oracle and against PyTorch's own function."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils._python_dispatch import TorchDispatchMode

import torch_power
from bridge import cases, cases_sdpa
from tests.sdpa_torch import IMPLEMENTATIONS, PLAIN_CALL, normal, one_thread, results  # noqa: F401
from torch_power import ops_sdpa
from torch_power.eager import sdpa as eager
from torch_power.sdpa import scaled_dot_product_attention as attention

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def assert_close(got, want, tolerance):
    """Relative L2 distance of two tensors of equal shape; a result that is exactly 0 must be found exactly."""
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    assert torch.linalg.vector_norm(got - want) <= tolerance * torch.linalg.vector_norm(want)


# ---------------------------------------------------------------------------------------------------------------------
# Against the oracle
# ---------------------------------------------------------------------------------------------------------------------

TORCH_CASES = [case for case in cases_sdpa.SDPA if "torch" in case.twins]


def to_torch(x: np.ndarray) -> torch.Tensor:
    if x.dtype == cases.NUMPY_DTYPES["bfloat16"]:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def serving(implementation: str, case: cases_sdpa.SdpaCase) -> str:
    """`implementation`; skips the test if that has no windows and the case has one."""
    if implementation == "cpp" and case.window is not None:
        with pytest.raises(NotImplementedError, match="windows and sequence lengths are not served"):
            q, k = torch.zeros(1, 1, case.t, 8), torch.zeros(1, 1, case.keys, 8)
            attention(q, k, k, local_window_size=case.window, implementation=implementation)
        pytest.skip("no windows")
    return implementation


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(case, dtype, id=f"{case.name}-{dtype}") for case in TORCH_CASES for dtype in case.dtypes],
)
def test_matches_oracle(case, dtype, implementation, monkeypatch):
    arrays = case.make(dtype)
    operands = {name: to_torch(x) for name, x in arrays.items()}
    q, k, v, dy = (operands[name].transpose(1, 2) for name in ("q", "k", "v", "dy"))
    bias, mask = operands.get("bias"), operands.get("mask")
    wanted = [x.requires_grad_() for x in (q, k, v, bias) if x is not None]
    # The seed is the one random draw of a call; here it is the one that the oracle has.
    monkeypatch.setattr(torch, "randint", lambda *_, **__: operands["seed"])
    y, lse = attention(
        q, k, v, mask if bias is None else bias, case.dropout_p, case.causal, case.scale, enable_gqa=case.h_q != case.h_kv,
        local_window_size=case.window, implementation=serving(implementation, case), return_residual=True,
    )  # fmt: skip
    assert y.dtype == q.dtype and not lse.requires_grad
    grads = torch.autograd.grad(y, wanted, dy)
    got = dict(zip(("dq", "dk", "dv", "dbias"), grads, strict=False)) | {"y": y}
    got = {name: (x if name == "dbias" else x.transpose(1, 2)).detach().double().numpy() for name, x in got.items()}
    want = case.exact(arrays, "zero")
    seen = np.isfinite(want["lse"])
    got["lse"] = lse.transpose(1, 2).double().numpy()
    assert (got["lse"][~seen] == -np.inf).all()
    for either in (got, want):
        either["lse"] = np.where(seen, either["lse"], 0)
    cases.assert_within(cases.errors(got, want, case, arrays["dy"]), cases_sdpa.bounds(dtype, implementation))


# ---------------------------------------------------------------------------------------------------------------------
# Against PyTorch's function
# ---------------------------------------------------------------------------------------------------------------------

MASKS = {
    "none": None,
    "bool": ("t", "s"), "bool_of_heads": ("h", 1, "s"), "bool_full": ("b", "h", "t", "s"),
    "float": ("t", "s"), "float_of_keys": ("b", 1, 1, "s"), "float_of_queries": ("h", "t", 1),
    "float_full": ("b", "h", "t", "s"),
}  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_cross_product(mask, dtype, implementation):
    """mask × causal × scale × grouped queries × lengths × value size, output and every gradient."""
    torch.manual_seed(0)
    for causal, scale, grouped, (t, s), e in itertools.product(
        (False, True), (None, -0.7, 0.0), (False, True), ((5, 7), (9, 4), (1, 1)), (8, 6)
    ):
        if causal and mask != "none":
            continue
        b, h_q, h_kv = 2, 4, 2 if grouped else 4
        sizes = {"b": b, "h": h_q, "t": t, "s": s, 1: 1}
        shape = None if MASKS[mask] is None else [sizes[axis] for axis in MASKS[mask]]
        attn_mask = None
        if mask.startswith("bool"):
            attn_mask = torch.rand(shape) < 0.6
        elif mask.startswith("float"):
            attn_mask = normal(*shape, dtype=dtype, grad=True)
        q, k, v = (normal(b, h, n, size, dtype=dtype, grad=True) for h, n, size in ((h_q, t, 8), (h_kv, s, 8), (h_kv, s, e)))
        options = {"attn_mask": attn_mask, "is_causal": causal, "scale": scale, "enable_gqa": grouped}
        dy = normal(b, h_q, t, e, dtype=dtype)
        # PyTorch's fused CPU kernel gives NaN where a causal call has scale ≤ 0; its plain one is right.
        with sdpa_kernel(SDPBackend.MATH) if causal else contextlib.nullcontext():
            want = results(lambda: F.scaled_dot_product_attention(q, k, v, **options), (q, k, v, attn_mask), dy)  # noqa: B023
        got = results(lambda: attention(q, k, v, **options, implementation=implementation), (q, k, v, attn_mask), dy)  # noqa: B023
        # With one key, or a bias constant along keys, a gradient is 0 but for cancellation: measured against dy.
        for ours, theirs in zip(got, want, strict=True):
            assert ours.shape == theirs.shape
            size = max(torch.linalg.vector_norm(theirs), torch.linalg.vector_norm(dy))
            assert torch.linalg.vector_norm(ours - theirs) <= TOLERANCE[dtype] * size


SHAPES = {
    "two_axes": ((5, 8), (7, 8), (7, 6)),
    "three_axes": ((3, 5, 8), (3, 7, 8), (3, 7, 6)),
    "five_axes": ((2, 3, 4, 5, 8), (1, 3, 4, 7, 8), (2, 1, 1, 7, 6)),
    "batch_of_keys": ((2, 4, 5, 8), (1, 4, 7, 8), (1, 4, 7, 8)),
    "batch_of_queries": ((1, 4, 5, 8), (3, 4, 7, 8), (3, 4, 7, 8)),
    "heads_of_keys": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    "heads_of_queries": ((2, 1, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "heads_of_values": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 1, 7, 8)),
    "batch_of_values_alone": ((1, 4, 5, 8), (1, 4, 7, 8), (2, 4, 7, 8)),
    "unequal_ranks": ((2, 4, 5, 8), (4, 7, 8), (7, 8)),
    "no_queries": ((2, 4, 0, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "no_keys": ((2, 4, 5, 8), (2, 4, 0, 8), (2, 4, 0, 8)),
    "no_batch": ((0, 4, 5, 8), (0, 4, 7, 8), (0, 4, 7, 8)),
    "no_heads": ((2, 0, 5, 8), (2, 0, 7, 8), (2, 0, 7, 8)),
    "no_head_size": ((2, 4, 5, 0), (2, 4, 7, 0), (2, 4, 7, 3)),
    "no_value_size": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 0)),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(shapes, causal, implementation):
    torch.manual_seed(0)
    operands = [normal(*shape, grad=True) for shape in shapes]
    theirs = F.scaled_dot_product_attention(*operands, is_causal=causal)
    dy = torch.randn_like(theirs)
    want = results(lambda: theirs, operands, dy)
    try:
        got = results(lambda: attention(*operands, is_causal=causal, implementation=implementation), operands, dy)
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    for ours, theirs in zip(got, want, strict=True):
        assert_close(ours, theirs, 1e-11)


@pytest.mark.parametrize("heads", [(4, 2, 1), (4, 4, 1), (6, 2, 3), (4, 1, 1), (4, 1, 2)], ids=str)
def test_grouped_heads_of_keys_and_values_may_differ(heads):
    q, k, v = (normal(2, h, n, 8, grad=True) for h, n in zip(heads, (5, 7, 7), strict=True))
    dy = normal(2, heads[0], 5, 8)
    want = results(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), (q, k, v), dy)
    got = results(lambda: attention(q, k, v, enable_gqa=True), (q, k, v), dy)
    for ours, theirs in zip(got, want, strict=True):
        assert_close(ours, theirs, 1e-11)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_fully_masked_rows_are_zero(kind, implementation):
    """Rows 2 and 5 see no key: output and gradient are exactly 0 there, and nothing is NaN anywhere."""
    visible = torch.rand(6, 7) < 0.8
    visible[[2, 5]] = False
    visible[[0, 1, 3, 4], 0] = True
    mask = visible if kind == "bool" else torch.zeros(6, 7).masked_fill(~visible, -math.inf).double().requires_grad_()
    q, k, v = normal(2, 3, 6, 8, grad=True), normal(2, 3, 7, 8, grad=True), normal(2, 3, 7, 8, grad=True)
    dy = normal(2, 3, 6, 8)
    got = results(lambda: attention(q, k, v, mask, implementation=implementation), (q, k, v, mask), dy)
    want = results(lambda: F.scaled_dot_product_attention(q, k, v, mask), (q, k, v, mask), dy)
    assert not got[0][:, :, [2, 5]].any()
    assert not got[1][:, :, [2, 5]].any()
    for ours, theirs in zip(got, want, strict=True):
        assert_close(ours, theirs, 1e-11)


@pytest.mark.parametrize("layout", ["heads_last", "gaps", "expanded", "offset", "reversed_axes"])
def test_strides(layout):
    make = {
        "heads_last": lambda h, n: normal(2, n, h, 8).transpose(1, 2),
        "gaps": lambda h, n: normal(2, h, 2 * n, 16)[:, :, ::2, ::2],
        "expanded": lambda h, n: normal(1, h, 1, 8).expand(2, h, n, 8),
        "offset": lambda h, n: normal(2 * h * n * 8 + 1)[1:].view(2, h, n, 8),
        "reversed_axes": lambda h, n: normal(8, n, h, 2).permute(3, 2, 1, 0),
    }[layout]
    q, k, v = (make(h, n).detach().requires_grad_() for h, n in ((4, 5), (2, 7), (2, 7)))
    mask = make(4, 8)[..., :5, :7]
    dy = make(4, 5)
    got = results(lambda: attention(q, k, v, mask, enable_gqa=True), (q, k, v), dy)
    q, k, v = (x.detach().contiguous().requires_grad_() for x in (q, k, v))
    want = results(lambda: attention(q, k, v, mask.contiguous(), enable_gqa=True), (q, k, v), dy.contiguous())
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_output_is_stored_as_pytorch_stores_it():
    heads_first, heads_last = normal(2, 4, 5, 8), normal(2, 5, 4, 8).transpose(1, 2)
    for q in (heads_first, heads_last, heads_first[0]):
        assert attention(q, q, q).stride() == F.scaled_dot_product_attention(q, q, q).stride()


@pytest.mark.parametrize("implementation", ["eager", "reference"])
def test_window(implementation):
    """One number stands for two; causality from the lower right is a window, for torch's own bias says the same."""
    q, k = normal(2, 4, 5, 8), normal(2, 4, 9, 8)
    attend = functools.partial(attention, q, k, k, implementation=implementation)
    assert torch.equal(attend(local_window_size=2), attend(local_window_size=(2, 2)))
    lower_right = causal_lower_right(5, 9)
    want = F.scaled_dot_product_attention(q, k, k, lower_right)
    torch.testing.assert_close(attend(local_window_size=(5, 9 - 5)), want)
    torch.testing.assert_close(attend(lower_right), want)
    torch.testing.assert_close(attend(causal_upper_left(5, 9)), attend(is_causal=True))
    torch.testing.assert_close(attend(lower_right, local_window_size=(1, 9)), attend(local_window_size=(1, 4)))
    with pytest.raises(ValueError, match="CausalBias should not be used with causal=True"):
        attend(lower_right, is_causal=True)
    with pytest.raises(RuntimeError, match="a CausalBias of 4 queries and 9 keys, for 5 and 9"):
        attend(causal_lower_right(4, 9))
    mapped = torch.vmap(lambda x: attention(x, k[0], k[0], local_window_size=1, implementation=implementation))(q)
    each = [attention(x, k[0], k[0], local_window_size=1, implementation=implementation) for x in q]
    torch.testing.assert_close(mapped, torch.stack(each))
    for wrong in (1.5, (1, 2, 3), (1, 2.0), "all"):
        with pytest.raises(ValueError, match="local_window_size should be an integer or a pair of integers, but got"):
            attend(local_window_size=wrong)


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------

Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 7, 8)
KEEP = torch.ones(5, 7, dtype=torch.bool)

# Calls that PyTorch refuses in words of its own that name the cause: ours are the same.
SAME_ERROR = {
    "one_axis": lambda f: f(Q[0, 0, 0], K[0, 0, 0], K[0, 0, 0]),
    "one_axis_query": lambda f: f(Q[0, 0, 0], K, K),
    "dtype_of_key": lambda f: f(Q, K.half(), K),
    "dtype_of_value": lambda f: f(Q, K, K.double()),
    "device_of_query": lambda f: f(Q.to("meta"), K, K),
    "device_of_mask": lambda f: f(Q, K, K[..., :6], KEEP.to("meta")),
    "mask_and_causal": lambda f: f(Q, K, K[..., :6], KEEP, is_causal=True),
    "mask_int": lambda f: f(Q, K, K, KEEP.int()),
    "mask_double": lambda f: f(Q, K, K, KEEP.double()),
    "mask_half_for_bfloat16": lambda f: f(Q.bfloat16(), K.bfloat16(), K.bfloat16(), KEEP.half()),
    "mask_of_other_heads": lambda f: f(Q, K, K, torch.ones(3, 5, 7, dtype=torch.bool)),
    "mask_of_other_length": lambda f: f(Q, K, K, torch.ones(5, 6, dtype=torch.bool)),
    "mask_of_larger_batch": lambda f: f(Q[:1], K[:1], K[:1], torch.zeros(2, 4, 5, 7)),
    "mask_of_more_axes": lambda f: f(Q, K, K, torch.ones(3, 2, 4, 5, 7, dtype=torch.bool)),
    "mask_is_a_list": lambda f: f(Q, K, K, attn_mask=[1]),
    "batch": lambda f: f(Q, torch.zeros(3, 4, 7, 8), torch.zeros(3, 4, 7, 8)),
    "heads": lambda f: f(Q, K[:, :2], K[:, :2]),
    "dropout_above_1": lambda f: f(Q, K, K, dropout_p=1.5),
    "dropout_is_a_string": lambda f: f(Q, K, K, dropout_p="a"),
    "scale_is_a_string": lambda f: f(Q, K, K, scale="a"),
    "scale_with_gradient": lambda f: f(Q, K, K, scale=torch.tensor(2.0, requires_grad=True)),
    "scale_of_two": lambda f: f(Q, K, K, scale=torch.ones(2)),
    "causal_is_an_integer": lambda f: f(Q, K, K, is_causal=1),
    "gqa_is_an_integer": lambda f: f(Q, K, K, enable_gqa=1),
    "gqa_without_heads_axis": lambda f: f(Q[0, 0], K[0, 0], K[0, 0], enable_gqa=True),
}
# Calls that it refuses with an unhelpful text, or (the last four) computes something meaningless for: ours name the
# cause.
OWN_ERROR = {
    "query_is_an_array": (lambda f: f(Q.numpy(), K, K), "argument 'query' (position 1) must be Tensor"),
    "gqa_of_3_for_4": (
        lambda f: f(Q, K[:, :3], K[:, :3], enable_gqa=True),
        "Number of heads in key and value must divide",
    ),
    "gqa_more_heads": (lambda f: f(Q[:, :2], K, K, enable_gqa=True), "Number of heads in key and value must divide"),
    "head_size": (lambda f: f(Q, K[..., :7], K), "same head size, but got 8 and 7"),
    "integers": (lambda f: f(Q.int(), K.int(), K.int()), "dtype int32 is not one of float16, bfloat16"),
    "complex": (lambda f: f(Q.cfloat(), K.cfloat(), K.cfloat()), "dtype complex64 is not one of"),
    "key_length": (lambda f: f(Q, K, K[:, :, :6]), "same length, but got 7 and 6"),
    "key_length_1": (lambda f: f(Q, K, K[:, :, :1]), "same length, but got 7 and 1"),
    "gqa_no_heads": (lambda f: f(Q, K[:, :0], K[:, :0], enable_gqa=True), "must divide the number of heads"),
    "dropout_negative": (lambda f: f(Q, K, K, dropout_p=-0.5), "between 0 and 1, but got -0.5"),
}


@pytest.mark.parametrize("name", SAME_ERROR)
def test_errors_are_pytorchs(name):
    with pytest.raises(Exception) as theirs:
        SAME_ERROR[name](F.scaled_dot_product_attention)
    with pytest.raises(type(theirs.value)) as ours:
        SAME_ERROR[name](attention)
    assert type(ours.value) is type(theirs.value)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("name", OWN_ERROR)
def test_errors_name_the_cause(name):
    call, text = OWN_ERROR[name]
    expected = (RuntimeError, TypeError)
    if name not in ("key_length", "key_length_1", "gqa_no_heads", "dropout_negative"):
        with pytest.raises(expected) as theirs:
            call(F.scaled_dot_product_attention)
        expected = type(theirs.value)
    with pytest.raises(expected) as ours:
        call(attention)
    assert text in str(ours.value)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing an implementation
# ---------------------------------------------------------------------------------------------------------------------


def test_unknown_implementation():
    with pytest.raises(ValueError, match="implementation='flash': expected one of .*'eager', 'reference'"):
        attention(Q, K, K, implementation="flash")


def test_implementation_block(monkeypatch):
    """A block's choice is used, an argument overrides it, and the block before it comes back."""
    used = []
    for name, entry in ops_sdpa.SDPA.items():

        def forward(*args, name=name, entry=entry):
            used.append(name)
            return entry.forward(*args)

        monkeypatch.setitem(ops_sdpa.SDPA, name, entry._replace(forward=forward))
    with torch_power.implementation("reference"):
        attention(Q, K, K)
        with torch_power.implementation(["eager", "reference"]):
            attention(Q, K, K)
            attention(Q, K, K, implementation="reference")
        attention(Q, K, K)
    assert used == ["reference", "eager", "reference", "reference"]


def test_unsupported_implementation_says_what_would_work(monkeypatch):
    entry = ops_sdpa.SDPA["eager"]
    monkeypatch.setitem(ops_sdpa.SDPA, "picky", entry._replace(supports=lambda call, device: f"scale={call.scale} is odd"))
    text = r"'picky' cannot serve this call: scale=3.0 is odd; implementation='\w+' would work"
    with pytest.raises(NotImplementedError, match=text):
        attention(Q, K, K, scale=3.0, implementation="picky")


def test_a_list_of_which_none_serves_names_every_reason():
    q = normal(1, 2, 5, 8)
    told = "'cuda' cannot serve this call: device cpu: .*'cpp' cannot serve this call: windows .*; implementation='eager' would"
    with torch_power.implementation(["cuda", "cpp"]), pytest.raises(NotImplementedError, match=told):
        attention(q, q, q, local_window_size=2)
    with pytest.raises(NotImplementedError, match="'cuda' cannot serve this call: device cpu: .*; implementation='.*' would"):
        attention(q, q, q, implementation="cuda")
    assert attention(q, q, q, implementation=["cuda", "eager"]).shape == q.shape
    with torch_power.implementation(["cuda", "eager"]):
        assert attention(q, q, q).shape == q.shape


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "dtype float32"), ({"d": 12}, "head size d=12"), ({"e": 264}, "head size e=264"), ({"h_q": 0}, "h_q=0"),
        ({"key_lengths": True}, "a mask says the same"), ({"b": 70_000, "bias_grad": True}, "65535 heads"),
    ],
    ids=str,
)  # fmt: skip
def test_cuda_says_what_it_lacks(changes, reason):
    call = dataclasses.replace(PLAIN_CALL, dtype="bfloat16" if changes else "float32", **changes)
    assert reason in ops_sdpa.SDPA["cuda"].supports(call, "cuda:0")


# ---------------------------------------------------------------------------------------------------------------------
# Memory and repeatability
# ---------------------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Records the largest storage that any operation inside the block returns, in bytes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("causal", [False, True])
def test_memory_is_linear_in_length(causal, dropout_p, monkeypatch):
    """No tensor is larger than an operand or a tile, whose size does not depend on t: forward and backward."""
    monkeypatch.setattr(eager, "QUERY_ROWS", 64)
    monkeypatch.setattr(eager, "KEY_ROWS", 64)
    for t in (256, 1024):
        q, k, v, dy = (torch.randn(1, 1, t, 8) for _ in range(4))
        call = ops_sdpa.make_call(q, k, v, None, None, causal=causal, scale=0.3, dropout_p=dropout_p, bias_grad=False)
        seed = torch.tensor([5]) if dropout_p else None
        with torch.no_grad(), LargestTensor() as seen:
            out, lse = eager.forward(call, q, k, v, None, None, seed)
            eager.backward(call, q, k, v, None, None, seed, out, lse, dy)
        operand, scores, random_bits = 4 * t * 8, 4 * 64 * 64, 8 * 64 * 64 if dropout_p else 0
        assert seen.bytes <= max(operand, scores, random_bits)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_runs_are_bit_equal(implementation):
    operands = [normal(2, 4, 300, 16, dtype=torch.float32, grad=True) for _ in range(3)]
    dy = normal(2, 4, 300, 16, dtype=torch.float32)
    first, second = (results(lambda: attention(*operands, implementation=implementation), operands, dy) for _ in range(2))
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours, theirs)
