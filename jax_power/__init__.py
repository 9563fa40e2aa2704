"""Power attention and scaled dot-product attention for JAX. The twin of `torch_power`."""

from bridge.spec import state_size, sympow_multiplicity
from jax_power.choice import implementation
from jax_power.power import PowerState, power_attention, power_step, sympow

__all__ = [
    "PowerState",
    "implementation",
    "power_attention",
    "power_step",
    "state_size",
    "sympow",
    "sympow_multiplicity",
]
