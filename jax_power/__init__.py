"""Power attention and scaled dot-product attention for JAX. The twin of `torch_power`."""

from bridge.spec import state_size, sympow_multiplicity
from jax_power.choice import implementation
from jax_power.power import PowerState, power_attention, power_step, sympow
from jax_power.sdpa import dot_product_attention

__all__ = [
    "PowerState",
    "dot_product_attention",
    "implementation",
    "power_attention",
    "power_step",
    "state_size",
    "sympow",
    "sympow_multiplicity",
]
