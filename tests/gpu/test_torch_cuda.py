"""What PyTorch does around the CUDA kernels: torch.compile, checkpoint, streams, no synchronisation, the first call, memory.

Both forms of power attention and softmax attention through the public functions. Skipped where there is no Hopper GPU or no
compiled library.
"""

from __future__ import annotations

import functools

import pytest

torch = pytest.importorskip("torch")

import torch_power  # noqa: E402
from benchmarks import host_overhead  # noqa: E402
from torch_power.cuda import library  # noqa: E402

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))


def softmax(q, k, v, log_g, **options):
    del log_g
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch_power.scaled_dot_product_attention(q, k, v, is_causal=True, **options).transpose(1, 2)


CALLS = {
    "attention": functools.partial(torch_power.power_attention, form="attention", implementation="cuda"),
    "chunked": functools.partial(torch_power.power_attention, form="chunked", implementation="cuda"),
    "softmax": functools.partial(softmax, implementation="cuda"),
}


def inputs(t: int, b: int = 1, h: int = 2, d: int = 64) -> list[torch.Tensor]:
    """q, k, v, log_g that want gradients."""
    torch.manual_seed(t)
    arrays = [torch.randn(b, t, h, d, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    return [x.requires_grad_() for x in (*arrays, torch.nn.functional.logsigmoid(torch.randn(b, t, h, device="cuda") + 3))]


def with_gradients(call, arrays):
    y = call(*arrays)
    upstream = torch.linspace(-1, 1, y.numel(), device="cuda", dtype=y.dtype).reshape(y.shape)
    return y.detach(), *torch.autograd.grad(y, [x for x in arrays if x.requires_grad], upstream, allow_unused=True)


def assert_equal_bits(got, want):
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        assert (x is None and y is None) or torch.equal(x, y), i


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


def test_compile_is_one_graph_at_any_length(call):
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for t in (100, 1000, 777):
        arrays = inputs(t)
        assert_equal_bits(with_gradients(compiled, arrays), with_gradients(call, arrays))


def test_checkpoint_gives_equal_bits(call):
    arrays = inputs(900)
    remade = functools.partial(torch.utils.checkpoint.checkpoint, call, use_reentrant=False)
    assert_equal_bits(with_gradients(remade, arrays), with_gradients(call, arrays))


def test_nothing_waits_for_the_gpu(call):
    """PyTorch raises where a call waits; the library's own launches are held to it by the capture of a graph, which
    refuses what synchronises or allocates outside the caching allocator."""
    arrays = inputs(900)
    want = with_gradients(call, arrays)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = with_gradients(call, arrays)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal_bits(got, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = with_gradients(call, arrays)
    graph.replay()
    torch.cuda.synchronize()
    assert_equal_bits(captured, want)


def test_work_goes_to_the_current_stream(call):
    """Inputs that another stream is still writing are read after they are written: nothing goes to the default stream."""
    arrays = inputs(1024)
    want = with_gradients(call, arrays)
    late = [torch.zeros_like(x).requires_grad_() for x in arrays]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(20_000_000)  # cycles: some 10 ms
        for x, y in zip(late, arrays, strict=True):
            x.copy_(y)
    with torch.cuda.stream(stream):
        got = with_gradients(call, late)
    stream.synchronize()
    assert_equal_bits(got, want)


@pytest.mark.parametrize(("b", "h"), [(1, 1), (3, 1), (512, 8)])
def test_heads_do_not_meet(call, b, h):
    """A batch of many heads gives each what it gets alone, up to the order of sums, which may depend on how many there are."""
    arrays = inputs(200, b, h)
    for x in arrays:
        x.data[-1] = x.data[0]
    y, *gradients = with_gradients(call, arrays)
    alone = [x.detach()[-1:].clone().requires_grad_() for x in arrays]
    z = call(*alone)
    upstream = torch.linspace(-1, 1, y.numel(), device="cuda", dtype=y.dtype).reshape(y.shape)[-1:]
    wanted = [x for x, dx in zip(alone, gradients, strict=True) if dx is not None]
    want = z.detach(), *torch.autograd.grad(z, wanted, upstream)
    got = y[-1:], *(dx[-1:] for dx in gradients if dx is not None)
    for i, (found, expected) in enumerate(zip(got, want, strict=True)):
        assert (found - expected).float().norm() <= 3e-3 * expected.float().norm(), i


def test_first_call_takes_no_time():
    """50 ms forward and backward after import, on a GPU that PyTorch already uses: nothing is compiled or tuned."""
    names = [f"torch_power/cuda/{name}" for name in ("attention", "chunked", "sdpa")]
    tries = [host_overhead.first_calls(names, "cuda", 4096) for _ in range(2)]
    assert all(min(found[name] for found in tries) < 50 for name in names), tries


def test_memory_of_a_long_call():
    """t = 65536, 8 heads of 64: inputs, result, gradients and all that is kept or worked with fit into 1 GiB."""
    arrays = inputs(65536, h=8)
    call = functools.partial(torch_power.power_attention, implementation="cuda")
    with_gradients(call, arrays)
    before = torch.cuda.memory_allocated() - sum(x.untyped_storage().nbytes() for x in arrays)
    torch.cuda.reset_peak_memory_stats()
    y = call(*arrays)
    gradients = torch.autograd.grad(y, arrays, torch.ones_like(y))
    peak = torch.cuda.max_memory_allocated() - before
    assert all(dx.isfinite().all() for dx in gradients)
    assert peak <= 2**30, peak / 2**20
