"""The tables of implementations of this package, and the one place that chooses from them."""

from __future__ import annotations

from bridge import spec
from jax_power import ops, ops_sdpa

CHOICE = spec.Choice({"power_attention": ops.POWER, "dot_product_attention": ops_sdpa.SDPA})

implementation = CHOICE.implementation
