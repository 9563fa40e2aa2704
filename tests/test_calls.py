"""What a repeated call no longer does: checks, the choice of an implementation, and `inspect` run once for each signature."""

from __future__ import annotations

import inspect
import threading

import pytest

torch = pytest.importorskip("torch")

import torch_power  # noqa: E402
from bridge import spec, spec_sdpa  # noqa: E402
from torch_power import calls, ops, ops_sdpa, power, sdpa  # noqa: E402

REMEMBERED = (ops._checked, power._planned, ops_sdpa._call, sdpa._plan)


@pytest.fixture(autouse=True)
def nothing_remembered():
    for function in REMEMBERED:
        function.cache_clear()
    yield
    for function in REMEMBERED:
        function.cache_clear()


def attend(t: int = 5, **options):
    """A call of power attention and its gradient."""
    q, k, v = (torch.randn(1, t, 2, 8, requires_grad=True) for _ in range(3))
    y = torch_power.power_attention(q, k, v, **options)
    return torch.autograd.grad(y.sum(), (q, k, v))


def attend_softmax(t: int = 5, **options):
    """A call of scaled dot-product attention and its gradient."""
    q, k, v = (torch.randn(1, 2, t, 8, requires_grad=True) for _ in range(3))
    return torch.autograd.grad(torch_power.scaled_dot_product_attention(q, k, v, **options).sum(), (q, k, v))


def attend_softmax_and_residual():
    """As `attend_softmax`, of a call that returns the log-sum-exp too."""
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    y, _ = torch_power.scaled_dot_product_attention(q, k, v, return_residual=True)
    return torch.autograd.grad(y.sum(), (q, k, v))


@pytest.mark.parametrize(
    ("call", "module", "checks"),
    [(attend, spec, "check_power"), (attend_softmax, spec_sdpa, "check_torch")],
    ids=["power", "sdpa"],
)  # fmt: skip
def test_once_for_each_signature(call, module, checks, monkeypatch):
    counts = {"checks": 0, "choices": 0}

    def counting(name, function):
        def counted(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return counted

    monkeypatch.setattr(module, checks, counting("checks", getattr(module, checks)))
    monkeypatch.setattr(spec.Choice, "choose", counting("choices", spec.Choice.choose))
    call()
    first = dict(counts)
    assert first["checks"] >= first["choices"] == 1
    call()
    assert counts == first
    call(t=6)  # another signature, and then another choice
    second = dict(counts)
    assert second == {name: 2 * n for name, n in first.items()}
    with torch_power.implementation("eager"):
        call(t=6)
    assert counts["choices"] == second["choices"] + 1


@pytest.mark.parametrize("call", [attend, attend_softmax])
def test_signatures_of_functions_are_not_read_again(call, monkeypatch):
    call()

    def refuse(*args, **kwargs):
        raise AssertionError("inspect.signature at a repeated call")

    monkeypatch.setattr(inspect, "signature", refuse)
    call()


@pytest.mark.parametrize(
    ("options", "text"),
    [({"deg": 2.0}, "deg=2.0: expected an integer"), ({"causal": 1}, "causal=1: expected True or False"),
     ({"chunk_size": 4.0}, "chunk_size=4.0: expected an integer"), ({"scale": True}, "scale=True: expected a real number"),
     ({"initial_state": [1, 2]}, "initial_state: expected a PowerState"), ({"form": "flat"}, "form='flat'"),
     ({"implementation": "flat"}, "implementation='flat'")],
)  # fmt: skip
def test_what_equals_a_right_argument_is_refused_each_time(options, text):
    attend(deg=2, causal=True, chunk_size=4, scale=1)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError)) as caught:
            attend(**({"deg": 2, "causal": True, "chunk_size": 4, "scale": 1} | options))
        assert text in str(caught.value)
        assert caught.value.__context__ is None


@pytest.mark.parametrize(
    ("call", "function"), [(attend, ops.PowerAttention), (attend_softmax_and_residual, ops_sdpa.Sdpa)], ids=["power", "sdpa"]
)
def test_what_is_kept_for_the_backward_pass_gets_no_zeros(call, function, monkeypatch):
    backward, seen = function.backward, []

    def spying(ctx, *grads):
        seen.append(grads)
        return backward(ctx, *grads)

    monkeypatch.setattr(function, "backward", staticmethod(spying))
    call()
    (grads,) = seen
    assert grads[0] is not None and all(grad is None for grad in grads[1:])


def test_a_recorded_call_equals_one_that_transforms_may_see(monkeypatch):
    q, k, v, dy = (torch.randn(2, 2, 5, 8, requires_grad=i < 3) for i in range(4))
    bias = torch.randn(2, 5, 5, requires_grad=True)

    def gradients(**options):
        torch.manual_seed(0)
        y = torch_power.scaled_dot_product_attention(q, k, v, bias, dropout_p=0.3, **options)
        return type(y.grad_fn).__name__, torch.autograd.grad(y, (q, k, v, bias), dy, retain_graph=True), y

    recorded, got, y = gradients()
    monkeypatch.setattr(sdpa, "transforms_active", lambda: True)
    general, want, same = gradients()
    assert (recorded, general) == ("SdpaRecordedBackward", "SdpaBackward")
    assert torch.equal(y, same) and all(map(torch.equal, got, want))
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(torch.autograd.grad(y.sum(), q, create_graph=True)[0].sum(), k)


def test_a_gradient_of_the_state_alone():
    q, k, v = (torch.randn(1, 5, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    y, (s, z) = torch_power.power_attention(q, k, v, return_state=True)
    for part in (s, z):
        alone = torch.autograd.grad(part.sum(), (k, v), retain_graph=True, allow_unused=True)
        beside = torch.autograd.grad(part.sum() + 0 * (y.sum() + s.sum() + z.sum()), (k, v), retain_graph=True)
        for got, want in zip(alone, beside, strict=True):
            torch.testing.assert_close(torch.zeros_like(want) if got is None else got, want)


def test_arguments_without_a_hash():
    assert len(attend(implementation=["eager", "cpp"])) == 3
    assert len(attend_softmax(implementation=["eager", "cpp"])) == 3
    with pytest.raises(TypeError, match=r"deg=\[2\]: expected an integer, got list"):
        attend(deg=[2])


def test_threads_and_a_bound():
    done = []

    @calls.remembered
    def double(x: int) -> int:
        return 2 * x

    def work():
        done.extend(double(x) == 2 * x for x in range(3 * calls.SIGNATURES))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 12 * calls.SIGNATURES and all(done)
    assert double.cache_info().currsize == calls.SIGNATURES


@pytest.mark.parametrize(
    ("name", "raw"),
    [("power_attention_cuda", ops.power_attention), ("power_attention_gradient_cuda", ops.power_attention_backward),
     ("sdpa_cuda", ops_sdpa.sdpa_forward), ("sdpa_gradient_cuda", ops_sdpa.sdpa_backward)],
)  # fmt: skip
def test_operators_in_cpp_have_the_schemas_of_those_they_replace(name, raw):
    if not hasattr(torch.ops.torch_power, name):
        pytest.skip("built without nvcc")
    schemas = [getattr(torch.ops.torch_power, name).default._schema, raw._schema]
    arguments = [[(x.name, str(x.type)) for x in schema.arguments] for schema in schemas]
    results = [[str(x.type) for x in schema.returns] for schema in schemas]
    assert arguments[0] == arguments[1] and results[0] == results[1]
    with pytest.raises(NotImplementedError, match="CPU"):  # and no kernel but on GPUs
        getattr(torch.ops.torch_power, name)(*(_example(x.type) for x in schemas[0].arguments))


def _example(kind: torch.Type):
    return {"Tensor": torch.zeros(1, 1, 1, 8), "int": 2, "float": 1.0, "bool": False, "str": "chunked"}.get(str(kind))
