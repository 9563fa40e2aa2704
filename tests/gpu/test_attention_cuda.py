"""The attention form's kernels on a Hopper GPU: the case table against the float64 oracle, larger shapes against a float64 sum.

Also equal bits, CUDA graphs, other strides, poisoned outputs. Skipped where there is no such GPU or no compiled library.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from bridge import cases, spec  # noqa: E402
from tests.gpu.standalone import attention_check  # noqa: E402
from torch_power.cuda import attention, library  # noqa: E402

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))

TABLE = [
    (case, dtype) for case in cases.POWER for dtype in ("bfloat16", "float16") if dtype in case.dtypes
    if "attention" in case.forms and case.b and not (case.initial_state or case.return_state)
]  # fmt: skip


def to_torch(x: np.ndarray) -> torch.Tensor:
    """A NumPy array on the GPU, bfloat16 through its bits."""
    if x.dtype == cases.NUMPY_DTYPES["bfloat16"]:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).cuda()
    return torch.from_numpy(x).cuda()


@pytest.mark.parametrize(("case", "dtype"), TABLE, ids=lambda x: getattr(x, "name", x))
def test_matches_oracle(case: cases.Case, dtype: str) -> None:
    arrays = case.make(dtype, seed=0)
    q, k, v, dy = (to_torch(arrays[name]) for name in ("q", "k", "v", "dy"))
    log_g = to_torch(arrays["log_g"]) if "log_g" in arrays else None
    options = {name: getattr(case, name) for name in ("deg", "scale", "causal", "normalize")}
    call = spec.check_power(q, k, v, log_g, **options, form="attention")
    reason = attention.supports(call, "cuda")
    if reason is not None:
        pytest.skip(reason)
    y, norm, *_ = attention.forward(call, q, k, v, log_g, None, None)
    dq, dk, dv, dlog_g, *_ = attention.backward(call, q, k, v, log_g, None, None, y, norm, dy, None, None)
    got = {"y": y, "dq": dq, "dk": dk, "dv": dv} | ({} if log_g is None else {"dlog_g": dlog_g})
    found = cases.errors({name: x.float().cpu().numpy() for name, x in got.items()}, case.exact(arrays), case, arrays["dy"])
    cases.assert_within(found, cases.bounds(dtype, "cuda", case), f"{case.name} {dtype}")


@pytest.mark.parametrize("shape", attention_check.FULL, ids=lambda shape: shape.name)
@pytest.mark.parametrize("seed", [0, 1])
def test_matches_float64_on_gpu(shape: attention_check.Shape, seed: int) -> None:
    assert attention_check.check(shape, seed)


def test_two_hundred_runs_give_equal_bits() -> None:
    assert attention_check.repeat(attention_check.Shape("repeat", t=1000, h_q=4, h_kv=2, gates="mild"), 200)


@pytest.mark.parametrize(("d", "t"), [(64, 8448), (128, 4224)])
def test_one_pass_gives_equal_bits(d: int, t: int) -> None:
    """More key blocks than multiprocessors, walked both ways: sums in device memory have one order."""
    shape = attention_check.Shape("one pass", b=2, t=t, h_q=8, h_kv=4, d=d, e=d)
    assert attention_check.repeat(shape, 20)


def test_arrays_that_the_copy_engine_cannot_address() -> None:
    """Heads before tokens, a sliced head size, a broadcast batch: the same result as from contiguous arrays."""
    shape = attention_check.Shape("strides", b=2, t=150)
    arrays = attention_check.inputs(shape, 3)
    want = attention_check.run(shape, arrays)
    odd = dict(arrays)
    odd["q"] = arrays["q"].transpose(1, 2).contiguous().transpose(1, 2)
    odd["k"] = torch.nn.functional.pad(arrays["k"], (0, 1))[..., :-1]
    odd["v"] = arrays["v"].flip(1).contiguous().flip(1)
    got = attention_check.run(shape, odd)
    for name, x in want.items():
        assert torch.equal(got[name], x), name


def test_cuda_graph_replays() -> None:
    """A captured forward and backward gives, on new inputs in the same memory, what a direct call gives."""
    shape = attention_check.Shape("graph", t=333, gates="mild")
    arrays = attention_check.inputs(shape, 4)
    call = spec.check_power(*(arrays[name] for name in ("q", "k", "v", "log_g")), form="attention")

    def run() -> list[torch.Tensor]:
        x = (arrays["q"], arrays["k"], arrays["v"], arrays["log_g"], None, None)
        y, norm, *_ = attention.forward(call, *x)
        return [y, *attention.backward(call, *x, y, norm, arrays["dy"], None, None)[:4]]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for name, x in attention_check.inputs(shape, 5).items():
        arrays[name].copy_(x)
    graph.replay()
    for got, want in zip(captured, run(), strict=True):
        assert torch.equal(got, want)


def test_follows_the_current_stream() -> None:
    """Work on another stream sees what was put on it before, without synchronising."""
    shape = attention_check.Shape("stream", t=512)
    arrays = attention_check.inputs(shape, 6)
    want = attention_check.run(shape, arrays)["y"]
    late = {name: torch.zeros_like(x) for name, x in arrays.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for name, x in arrays.items():
            late[name].copy_(x)
        call = spec.check_power(late["q"], late["k"], late["v"], form="attention")
        y, *_ = attention.forward(call, late["q"], late["k"], late["v"], None, None, None)
    stream.synchronize()
    assert torch.equal(y, want)
