"""The portable implementation: plain tensor operations, any device."""

from torch_power.eager import power

__all__ = ["power"]
