"""`torch_power.compat`: the other packages' names and arguments, against the oracle and against their own formula."""

import numpy as np
import pytest
import torch

from bridge import cases, oracle
from torch_power import PowerState, power_attention
from torch_power.compat import power_full, power_retention, power_retention_inference

B, T, H_Q, H_KV, D = 1, 96, 4, 2, 16


def make(
    t: int = T, *, dtype: torch.dtype = torch.float32, gates: bool = True, seed: int = 0
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    inputs = {"Q": normal(B, t, H_Q, D), "K": normal(B, t, H_KV, D), "V": normal(B, t, H_KV, D)}
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    if gates:
        inputs["log_G"] = torch.nn.functional.logsigmoid(normal(B, t, H_KV) + 3)
    return inputs


def exact(inputs: dict[str, torch.Tensor], **options) -> np.ndarray:
    arrays = [inputs[name].double().numpy() for name in ("Q", "K", "V")]
    gates = inputs.get("log_G")
    return oracle.power(*arrays, None if gates is None else gates.double().numpy(), **options).y


def error(got: torch.Tensor, want) -> float:
    want = want if isinstance(want, np.ndarray) else want.detach().double().numpy()
    return cases.relative_error(got.detach().double().numpy(), want)


def cut(inputs: dict[str, torch.Tensor], start: int, stop: int | None = None) -> dict[str, torch.Tensor]:
    return {name: x[:, start:stop] for name, x in inputs.items()}


def state_of(result) -> dict[str, torch.Tensor]:
    _, state, sum_of_keys = result
    return {"initial_state": state, "sum_of_keys": sum_of_keys}


def test_the_quick_start_of_power_attention_runs_unchanged():
    generator = torch.Generator().manual_seed(0)
    Q, K, V = (torch.randn(2, 1024, 8, 64, generator=generator).half() for _ in range(3))
    output = power_full(Q=Q, K=K, V=V, deg=4, chunk_size=128)
    assert output.shape == Q.shape and output.dtype == torch.float16
    some = (slice(1, 2), slice(0, 400), slice(3, 5))  # the oracle is slow: the first 400 tokens of two heads will do
    want = exact({"Q": Q[some], "K": K[some], "V": V[some]}, deg=4)
    assert error(output[some], want) <= 3e-4


def peers_attention(Q, K, V, log_G, deg, scale):
    """Attention by the formula of `retention`, in float64, with its two epsilons. No grouped heads."""
    q, k, v = (x.double().transpose(1, 2) for x in (Q, K, V))
    decay = log_G.double().cumsum(1).transpose(1, 2)
    logits = deg * torch.log((q @ k.mT * scale).abs() + 1e-7) + decay[..., :, None] - decay[..., None, :]
    logits = logits.masked_fill(~torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(), -torch.inf)
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    return (weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)).transpose(1, 2)


def test_agrees_with_the_peers_formula_but_for_its_epsilons():
    inputs = make()
    inputs["Q"] = inputs["Q"][:, :, :H_KV]
    want = peers_attention(**inputs, deg=2, scale=D**-0.5)
    assert error(power_retention(**inputs, chunk_size=32), want) < 1e-5
    # Documented difference: scaling the inputs changes the peer's result, not this one.
    small = {**inputs, "Q": inputs["Q"] * 2.0**-10, "K": inputs["K"] * 2.0**-10}
    assert torch.equal(power_retention(**small, chunk_size=32), power_retention(**inputs, chunk_size=32))
    assert error(peers_attention(**small, deg=2, scale=D**-0.5), want) > 1e-3


@pytest.mark.parametrize(
    "options", [{}, {"chunk_size": 16}, {"chunk_size": 40}, {"chunk_size": 16, "switch_over_seq_len": 64}]
)
@pytest.mark.parametrize("gates", [True, False])
def test_power_retention_matches_the_oracle(options, gates):
    inputs = make(gates=gates)
    exact_y = exact(inputs)
    assert error(power_retention(**inputs, **options), exact_y) <= 2e-6
    y, state, sum_of_keys = power_retention(**inputs, **options, return_final_state=True)
    assert error(y, exact_y) <= 2e-6
    want = power_attention(*inputs.values(), return_state=True)[1]
    assert error(state, want.s) <= 2e-6 and error(sum_of_keys, want.z) <= 2e-6


def test_scale_and_degree():
    inputs = make(gates=False)
    assert error(power_retention(**inputs, deg=4, scale=0.3), exact(inputs, deg=4, scale=0.3)) <= 2e-6
    assert error(power_full(**inputs, deg=6), exact(inputs, deg=6)) <= 2e-6
    assert not power_retention(**inputs, scale=0.0).any()
    with pytest.raises(ValueError, match="deg=3"):
        power_retention(**inputs, deg=3)


def test_state_is_handed_on_with_gradients():
    leaves = {name: x.requires_grad_() for name, x in make().items()}
    upstream = torch.randn(B, T, H_Q, D, generator=torch.Generator().manual_seed(5))
    want = torch.autograd.grad(power_retention(**leaves), list(leaves.values()), upstream)
    first = power_retention(**cut(leaves, 0, 37), return_final_state=True)
    second = power_retention(**cut(leaves, 37), chunk_size=16, **state_of(first))
    got = torch.autograd.grad(torch.cat([first[0], second], 1), list(leaves.values()), upstream)
    for name, a, b in zip(leaves, got, want, strict=True):
        assert error(a, b) <= 1e-5, name


def test_states_of_other_dtypes_and_gates_of_other_dtypes_are_converted():
    inputs = make(dtype=torch.bfloat16)
    first = power_retention(**cut(inputs, 0, 50), return_final_state=True)
    rounded = {name: x.bfloat16() for name, x in state_of(first).items()}
    got = power_retention(**{**cut(inputs, 50), "log_G": inputs["log_G"][:, 50:].double()}, **rounded)
    assert got.dtype == torch.bfloat16
    assert error(got, exact(inputs)[:, 50:]) <= 1e-2


def test_no_state_below_the_switch_over_length():
    inputs = make(40)
    y, state, sum_of_keys = power_retention(**inputs, switch_over_seq_len=41, return_final_state=True)
    assert state is None and sum_of_keys is None and error(y, exact(inputs)) <= 2e-6
    assert power_retention(**inputs, switch_over_seq_len=40, return_final_state=True)[1] is not None
    # The length that counts is that of whole chunks.
    assert power_retention(**inputs, chunk_size=64, return_final_state=True)[1] is not None


@pytest.mark.parametrize("t, expected", [(90, 64), (96, 96), (20, 0)])
def test_original_t_keeps_the_unfinished_chunk_out_of_the_state(t, expected):
    inputs = make(t)
    y, state, sum_of_keys = power_retention(**inputs, chunk_size=32, original_t=t, return_final_state=True)
    assert error(y, exact(inputs)) <= 2e-6
    want = power_attention(*cut(inputs, 0, expected).values(), return_state=True)[1]
    assert error(state, want.s) <= 2e-6 and error(sum_of_keys, want.z) <= 2e-6


@pytest.mark.parametrize("gates", [True, False])
@pytest.mark.parametrize("t_q", [1, 5, T])
@pytest.mark.parametrize("in_state", [0, 30])
def test_inference_gives_the_last_rows(gates, t_q, in_state):
    inputs = make(in_state + T, gates=gates)
    want = exact(inputs)[:, -t_q:]
    state = {}
    if in_state:
        state = state_of(power_retention(**cut(inputs, 0, in_state), return_final_state=True))
    cache = cut(inputs, in_state)
    cache["Q"] = cache["Q"][:, -t_q:]
    kept = power_retention_inference(**cache, **state)
    assert error(kept[0], want) <= 2e-6
    assert kept[1] is state.get("initial_state") and kept[2] is state.get("sum_of_keys")
    folded = power_retention_inference(**cache, **state, switch_over_seq_len=T)
    assert error(folded[0], want) <= 2e-6
    whole = power_attention(*inputs.values(), return_state=True)[1]
    assert error(folded[1], whole.s) <= 2e-6 and error(folded[2], whole.z) <= 2e-6


def test_decoding_loop_over_several_foldings():
    inputs, prompt = make(60), 20
    want = exact(inputs)
    cache, state, rows = cut(inputs, 0, prompt), {}, []
    for t in range(prompt, 60):
        cache = {name: torch.cat([x, inputs[name][:, t : t + 1]], 1) for name, x in cache.items()}
        step = {**cache, "Q": cache["Q"][:, -1:]}
        y, *new = power_retention_inference(**step, **state, switch_over_seq_len=16)
        rows.append(y)
        if new[0] is not state.get("initial_state"):
            cache = cut(cache, cache["K"].shape[1])
        state = {"initial_state": new[0], "sum_of_keys": new[1]}
    assert error(torch.cat(rows, 1), want[:, prompt:]) <= 2e-6


def test_inference_from_the_state_alone():
    inputs = make()
    _, state, sum_of_keys = power_retention(**inputs, return_final_state=True)
    y, *_ = power_retention_inference(inputs["Q"][:, -1:], None, None, None, state, sum_of_keys)
    assert error(y, exact(inputs)[:, -1:]) <= 2e-6


def test_inference_does_not_depend_on_the_size_of_the_inputs():
    inputs = make(dtype=torch.float16)
    inputs = {**inputs, "Q": inputs["Q"][:, -3:]}
    large = {**inputs, "Q": inputs["Q"] * 1024, "K": inputs["K"] * 1024}
    y = power_retention_inference(**inputs, deg=4)[0]
    assert y.isfinite().all() and y.abs().sum() > 0
    assert torch.equal(power_retention_inference(**large, deg=4)[0], y)


def test_strong_gates_in_inference():
    inputs = make()
    inputs["log_G"] = torch.where(torch.arange(T)[None, :, None] % 3 == 0, -50.0, -0.01).expand(B, T, H_KV).contiguous()
    want = exact(inputs)[:, -4:]
    assert error(power_retention_inference(**{**inputs, "Q": inputs["Q"][:, -4:]})[0], want) <= 2e-6


WRONG = {
    "odd degree": ({"deg": 3}, "deg=3"),
    "half a state": ({"initial_state": torch.zeros(B, H_KV, 192, D)}, "sum_of_keys"),
    "other half": ({"sum_of_keys": torch.zeros(B, H_KV, 192)}, "initial_state"),
    "state of another layout": (
        {"initial_state": torch.zeros(B, H_KV, 256, D), "sum_of_keys": torch.zeros(B, H_KV, 256)},
        "initial_state.s",
    ),
    "heads": ({"Q": torch.zeros(B, T, 3, D)}, "h_q=3"),
    "chunk size": ({"chunk_size": 0, "return_final_state": True}, "chunk_size=0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_of_power_retention(name):
    options, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        power_retention(**{**make(), **options})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"deg": 3}, "deg=3"),
        ({"K": None}, "K, V"),
        ({"K": None, "V": None, "log_G": None}, "initial_state"),
        ({"Q": torch.zeros(B, T + 1, H_Q, D)}, f"Q: length {T + 1} exceeds the length {T} of K"),
        ({"sum_of_keys": torch.zeros(B, H_KV, 192)}, "initial_state"),
    ],
)
def test_wrong_calls_of_power_retention_inference(options, message):
    with pytest.raises(ValueError, match=message):
        power_retention_inference(**{**make(), **options})
    state = PowerState(torch.zeros(B, H_KV, 192, D), torch.zeros(B, H_KV, 192))
    with pytest.raises(ValueError, match="log_G"):
        power_retention_inference(make()["Q"], None, None, make()["log_G"], *state)
