"""`torch_power.power_attention` among PyTorch's transformations, and what its memory and steps cost."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import torch_power
from bridge import cases, spec, twins
from torch_power import ops

OPTIONS = [{"form": "attention"}, {"form": "chunked", "chunk_size": 4}, {"form": "recurrent"}]
# Those that run here: the fused ones are tested on a GPU, in tests/gpu.
NAMES = tuple(name for name in twins.TORCH.implementations("power_attention") if name not in cases.FUSED)


def inputs(dtype=torch.float64, t=10, d=8, e=5, requires_grad=False, batch=()):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*batch, *shape, generator=generator, dtype=dtype)

    gates = -torch.rand(*batch, 2, t, 2, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    arrays = normal(2, t, 4, d), normal(2, t, 2, d), normal(2, t, 2, e), gates
    return tuple(x.requires_grad_(requires_grad) for x in arrays)


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options["form"])
def test_gradcheck(options, implementation):
    q, k, v, log_g = inputs(t=5, e=3, requires_grad=True)
    _, state = torch_power.power_attention(*(x.detach() for x in (q, k, v, log_g)), return_state=True)

    def call(q, k, v, log_g, s, z):
        y, state = torch_power.power_attention(
            q, k, v, log_g, initial_state=torch_power.PowerState(s, z), return_state=True, implementation=implementation,
            **options,
        )  # fmt: skip
        return y, state.s.sum((0, 1, 2)), state.z.sum((0, 1))

    assert torch.autograd.gradcheck(call, (q, k, v, log_g, *(x.requires_grad_() for x in state)), fast_mode=True)


@pytest.mark.parametrize("implementation", NAMES)
def test_opcheck(implementation):
    q, k, v, log_g = inputs(torch.float32)
    _, state = torch_power.power_attention(q, k, v, log_g, return_state=True)
    for extra, return_state in (((None, None, None), False), ((log_g, *state), True)):
        options = 2, 0.5, True, True, "chunked", 4, return_state, implementation, True
        torch.library.opcheck(ops.power_attention, (q, k, v, *extra, *options))
        y, norm, saved, s, z = ops.power_attention(q, k, v, *extra, *options)
        upstream = (torch.randn_like(y), s, z) if return_state else (torch.randn_like(y), None, None)
        torch.library.opcheck(ops.power_attention_backward, (q, k, v, *extra, y, norm, saved, *upstream, *options))


def test_func_grad_and_vmap():
    q, k, v, log_g = inputs(batch=(3,))

    def loss(q, k, v, log_g):
        y, state = torch_power.power_attention(q, k, v, log_g, return_state=True)
        return y.square().sum() + state.s.square().sum()

    grad = torch.func.grad(loss, argnums=(0, 1, 2, 3))
    want = [torch.stack(x) for x in zip(*(grad(*arrays) for arrays in zip(q, k, v, log_g, strict=True)), strict=True)]
    for got, expected in zip(torch.vmap(grad)(q, k, v, log_g), want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("unbatched", range(4))
def test_vmap_with_an_unbatched_operand(unbatched):
    arrays = list(inputs(batch=(3,)))
    arrays[unbatched] = arrays[unbatched][0]
    axes = tuple(None if n == unbatched else 0 for n in range(4))
    got = torch.vmap(torch_power.power_attention, in_dims=axes)(*arrays)
    for n in range(3):
        want = torch_power.power_attention(*(x if axis is None else x[n] for x, axis in zip(arrays, axes, strict=True)))
        torch.testing.assert_close(got[n], want)


@pytest.mark.parametrize("implementation", NAMES)
def test_compile_sees_one_operator(implementation):
    q, k, v, log_g = inputs(torch.float32, requires_grad=True)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    def step(q, k, v, log_g):
        return torch_power.power_attention(2 * q, k, v, log_g, implementation=implementation).relu()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(step(q, k, v, log_g).sum(), (q, k, v, log_g))
    got = torch.autograd.grad(compiled(q, k, v, log_g).sum(), (q, k, v, log_g))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)
    torch.compile(step, fullgraph=True, backend=backend)(*(x.detach() for x in (q, k, v, log_g)))
    assert len(graphs) == 1


@pytest.mark.parametrize("form", ["attention", "chunked"])
def test_compile_at_other_lengths(form):
    """The second length makes t symbolic, and with it the chunk length."""
    torch._dynamo.reset()
    compiled = torch.compile(torch_power.power_attention, fullgraph=True, backend="aot_eager")
    for t in (9, 6, 700):
        arrays = inputs(torch.float32, t=t, requires_grad=True)
        got, want = (torch.autograd.grad(f(*arrays, form=form).sum(), arrays) for f in (compiled, torch_power.power_attention))
        torch.testing.assert_close(got, want)


def test_compile_step_and_block():
    q, k, v, log_g = inputs(torch.float32)
    step = torch.compile(torch_power.power_step, fullgraph=True, backend="aot_eager")
    with torch_power.implementation("eager"):
        y, state = step(q[:, 0], k[:, 0], v[:, 0], log_g[:, 0])
    want, want_state = torch_power.power_step(q[:, 0], k[:, 0], v[:, 0], log_g[:, 0])
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(state.s, want_state.s)


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return torch_power.power_attention(q, k, v)

    q, k, v, _ = inputs(torch.float32)
    torch.testing.assert_close(torch.export.export(Layer(), (q, k, v)).module()(q, k, v), torch_power.power_attention(q, k, v))


def test_autocast():
    q, k, v, log_g = inputs(torch.float32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch_power.power_attention(q, k, v, log_g)
    want = torch_power.power_attention(*(x.bfloat16() for x in (q, k, v)), log_g)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, want, rtol=0, atol=0)
    y.float().sum().backward()
    assert q.grad.dtype == torch.float32


@pytest.mark.parametrize("implementation", NAMES)
def test_any_strides(implementation):
    arrays = inputs(torch.float32)
    want = torch_power.power_attention(*arrays, implementation=implementation)
    strided = [x.movedim(1, -1).contiguous().movedim(-1, 1) for x in arrays]
    strided[0] = torch.cat((torch.zeros(3), arrays[0].flatten()))[3:].view_as(arrays[0])  # 12 bytes off any vector
    strided[2] = arrays[2].repeat_interleave(2, -1)[..., ::2]
    got = torch_power.power_attention(*strided, implementation=implementation)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    q, k, v, _ = arrays
    expanded = torch_power.power_attention(q, k[:, :, :1].expand(-1, -1, 4, -1), v[:, :, :1].expand(-1, -1, 4, -1),
                                           implementation=implementation)  # fmt: skip
    one_head = torch_power.power_attention(q, k[:, :, :1], v[:, :, :1], implementation=implementation)
    torch.testing.assert_close(expanded, one_head)


def test_checkpoint():
    q, k, v, log_g = inputs(requires_grad=True)
    want = torch.autograd.grad(torch_power.power_attention(q, k, v, log_g).square().sum(), (q, k, v, log_g))
    y = torch.utils.checkpoint.checkpoint(torch_power.power_attention, q, k, v, log_g, use_reentrant=False)
    for got, expected in zip(torch.autograd.grad(y.square().sum(), (q, k, v, log_g)), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_second_derivatives_are_refused():
    q, k, v, log_g = inputs(requires_grad=True)
    y = torch_power.power_attention(q, k, v, log_g)
    (dq,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
        dq.sum().backward()


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("name", ["gates", "state_to_state", "degree_4", "degree_1"])
def test_steps_are_the_sequence(name, implementation):
    case = dataclasses.replace(cases.BY_NAME[name], b=1, t=12)
    arrays = {n: torch.from_numpy(x) for n, x in case.make("float64").items()}
    state = torch_power.PowerState(arrays["s0"], arrays["z0"]) if case.initial_state else None
    sequence = [arrays["q"], arrays["k"], arrays["v"], arrays["log_g"]]
    options = {"deg": case.deg, "normalize": case.normalize, "implementation": implementation}
    want, want_state = torch_power.power_attention(*sequence, initial_state=state, return_state=True, **options)
    for i in range(case.t):
        y, state = torch_power.power_step(*(x[:, i] for x in sequence), state, **options)
        torch.testing.assert_close(y, want[:, i])
    torch.testing.assert_close(state, want_state)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any result of any operation had."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("form", ["attention", "chunked"])
def test_memory_is_linear(form):
    """No intermediate has t² elements, or a feature for every token, forward or backward."""
    t = 4096
    q, k, v = (torch.randn(1, t, 1, 16, requires_grad=True) for _ in range(3))
    log_g = -torch.rand(1, t, 1)
    raw = functools.partial(spec.check_power, deg=2, form=form)
    with LargestTensor() as largest:
        call = raw(q, k, v, log_g)
        arrays = q.detach(), k.detach(), v.detach(), log_g, None, None
        y, norm, _, _ = ops.POWER["eager"].forward(call, *arrays)
        ops.POWER["eager"].backward(call, *arrays, y, norm, torch.randn_like(y), None, None)
    assert largest.numel <= max(512 * 512, t * 17, 512 * call.rows)
    assert largest.numel < min(t * t, t * spec.state_rows(16, 2)) / 2
