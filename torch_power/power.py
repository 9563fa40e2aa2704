"""Power attention for PyTorch: signatures, meaning, argument checks and the choice of an implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from jaxtyping import Float
from torch import Tensor

from bridge import spec
from torch_power import ops
from torch_power.calls import remembered, transforms_active
from torch_power.choice import CHOICE, autocast_available
from torch_power.eager import features


class PowerState(NamedTuple):
    """What a sequence leaves behind: s = Σ φ(k_j) v_jᵀ and z = Σ φ(k_j), each token decayed by the gates after it.

    float32 (float64 for float64 inputs), independent of `scale`, of the chunk length and of the framework that made it.
    """

    s: Float[Tensor, "b h_kv D e"]
    z: Float[Tensor, "b h_kv D"]


@overload
def power_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None = None,
    *,
    deg: int = 2,
    scale: float | None = None,
    causal: bool = True,
    normalize: bool = True,
    form: str = "auto",
    chunk_size: int | None = None,
    initial_state: PowerState | None = None,
    return_state: Literal[False] = False,
    implementation: str | Sequence[str] | None = None,
) -> Tensor: ...
@overload
def power_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None = None,
    *,
    deg: int = 2,
    scale: float | None = None,
    causal: bool = True,
    normalize: bool = True,
    form: str = "auto",
    chunk_size: int | None = None,
    initial_state: PowerState | None = None,
    return_state: Literal[True],
    implementation: str | Sequence[str] | None = None,
) -> tuple[Tensor, PowerState]: ...
def power_attention(
    q: Float[Tensor, "b t h_q d"],
    k: Float[Tensor, "b t_kv h_kv d"],
    v: Float[Tensor, "b t_kv h_kv e"],
    log_g: Float[Tensor, "b t_kv h_kv"] | None = None,
    *,
    deg: int = 2,
    scale: float | None = None,
    causal: bool = True,
    normalize: bool = True,
    form: str = "auto",
    chunk_size: int | None = None,
    initial_state: PowerState | None = None,
    return_state: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> Float[Tensor, "b t h_q e"] | tuple[Float[Tensor, "b t h_q e"], PowerState]:
    """Power attention: softmax's exp(s) replaced by s**deg, at a cost linear in t.

        w_ij = (scale · <q_i, k_j>)^deg · exp(G_i − G_j)  for j ≤ i,        y_i = Σ_j w_ij v_j / Σ_j w_ij

    with G the running sum of `log_g` (Buckman, Gelada & Zhang, "Symmetric Power Transformers", 2024). The chunked form costs
    about 4·D·e + 2·chunk_size·d operations a token and head, D = `state_size(d, e, deg).rows`; for short sequences the
    quadratic sum is cheaper and is chosen (`bridge.spec.choose_form`). Memory is linear in t in every form, both ways.

    Args:
      q: queries. Head i reads key-value head `i // (h_q // h_kv)`.
      k: keys.
      v: values; their head size may differ from that of q and k.
      log_g: natural log of the forget gate, float32, finite, ≤ 0 to forget. The gate of token j decays everything before j,
        not j itself; the first one acts on `initial_state` alone.
      deg: the power, an integer ≥ 1; even if `normalize`.
      scale: multiplies the scores; 1/sqrt(d) by default. Any finite number, 0 and negatives included.
      causal: token i sees tokens up to i. False: every query sees every key, k and v may have another length than q.
      normalize: divide by Σ_j w_ij. There is no epsilon: a row whose weights are all 0 gives 0, with gradient 0, and y does
        not depend on the size of q or k.
      form: "attention" (the O(t²) sum), "chunked" (O(t)), "recurrent" (token by token), or "auto", the cheapest. All equal.
      chunk_size: chunk length, any positive integer; by default a fitting one.
      initial_state: what earlier tokens left. `deg` and head sizes must match.
      return_state: also return the state after the last token.
      implementation: name of an implementation, or several in order of preference; by default the fastest that can.
    Returns:
      y in the dtype of `v`; with `return_state`, also the `PowerState`.
    Raises:
      TypeError, ValueError: an argument is outside what the formula allows (the message names it).
      NotImplementedError: no implementation asked for can serve this call (the message gives each one's reason).
    """
    q, k, v = map(_autocast, (q, k, v))
    call = ops.check(q, k, v, log_g, initial_state, deg, scale, causal, normalize, form, chunk_size, return_state)
    name, call = _planned(call, implementation, CHOICE.in_force(), q.device.type)
    s0, z0 = (None, None) if initial_state is None else initial_state
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, log_g, s0, z0))
    run = ops.PowerAttention.apply if save or transforms_active() else ops.PowerAttention.forward
    y, _, _, s, z = run(
        q, k, v, log_g, s0, z0, call.deg, call.scale, call.causal, call.normalize, call.form, call.chunk_size,
        call.return_state, name, save,
    )  # fmt: skip
    y = y.to(v.dtype)
    return (y, PowerState(s, z)) if return_state else y


def power_step(
    q: Float[Tensor, "b h_q d"],
    k: Float[Tensor, "b h_kv d"],
    v: Float[Tensor, "b h_kv e"],
    log_g: Float[Tensor, "b h_kv"] | None = None,
    state: PowerState | None = None,
    *,
    deg: int = 2,
    scale: float | None = None,
    normalize: bool = True,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Tensor, "b h_q e"], PowerState]:
    """One token of power attention: state in, output and state out, at a cost that does not depend on what came before.

        S = exp(log_g) S + φ(k) vᵀ,    z = exp(log_g) z + φ(k),    y = ψ(scale·q)ᵀ S / ψ(scale·q)ᵀ z

    Args:
      q, k, v, log_g: one token of `power_attention`'s arguments, without the time axis.
      state: what earlier tokens left; None at the start.
      deg, scale, normalize, implementation: as in `power_attention`.
    Returns:
      y in the dtype of `v`, and the `PowerState` to pass with the next token.
    Raises:
      TypeError, ValueError, NotImplementedError: as `power_attention`.
    """
    spec.check_step(q, k, v, log_g)
    y, state = power_attention(
        q[:, None], k[:, None], v[:, None], None if log_g is None else log_g[:, None],
        deg=deg, scale=scale, normalize=normalize, form="recurrent", initial_state=state, return_state=True,
        implementation=implementation,
    )  # fmt: skip
    return y[:, 0], state


def sympow(x: Float[Tensor, "... d"], deg: int) -> Float[Tensor, "... D"]:
    """φ(x), the expansion that a state is made of: <sympow_multiplicity(d, deg) · φ(q), φ(k)> = <q, k>^deg.

    Args:
      x: vectors, any floating dtype (the products are taken in it).
      deg: degree, 1 to 4; the head size d must be a multiple of the degree's tile (8, 8, 4, 2).
    Returns:
      φ(x), D = `state_size(d, e, deg).rows`: for all tile tuples I_1 ≤ … ≤ I_deg in lexicographic order, the flattened
      outer product of these tiles of x.
    Raises:
      TypeError, ValueError: `deg` or the head size is outside what the layout allows.
    """
    return features.sympow(x, deg)


@remembered
def _planned(
    call: spec.PowerCall, implementation: str | Sequence[str] | None, in_force: tuple[str, ...] | None, device: str
) -> tuple[str, spec.PowerCall]:
    """The name of the implementation that serves the call, and the call with what was left open chosen to suit it."""
    name = CHOICE.choose("power_attention", call, in_force if implementation is None else implementation, device)
    return name, ops.POWER[name].plan(call)


def _autocast(x: Any) -> Any:
    """Under `torch.autocast`, a float32 tensor in the autocast dtype, as for PyTorch's own attention; else `x` as it is."""
    if not isinstance(x, Tensor) or x.dtype != torch.float32 or not autocast_available(x.device.type):
        return x
    if not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
