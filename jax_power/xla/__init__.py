"""The portable implementation: plain XLA, any device."""

from jax_power.xla import power

__all__ = ["power"]
