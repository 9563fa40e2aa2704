"""Power attention and scaled dot-product attention for PyTorch. The twin of `jax_power`."""

from bridge.spec import state_size, sympow_multiplicity
from torch_power.choice import implementation
from torch_power.dropin import install_sdpa, installed_sdpa, uninstall_sdpa
from torch_power.power import PowerState, power_attention, power_step, sympow
from torch_power.sdpa import scaled_dot_product_attention

__all__ = [
    "PowerState",
    "implementation",
    "install_sdpa",
    "installed_sdpa",
    "power_attention",
    "power_step",
    "scaled_dot_product_attention",
    "state_size",
    "sympow",
    "sympow_multiplicity",
    "uninstall_sdpa",
]
