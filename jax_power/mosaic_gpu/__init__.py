"""The fused implementation: Pallas kernels for Hopper GPUs, compiled by Mosaic GPU."""

from jax_power.mosaic_gpu import power, sdpa

__all__ = ["power", "sdpa"]
