"""The compiled CPU implementation: `implementation="cpp"`."""

from torch_power.cpp import power, sdpa

__all__ = ["power", "sdpa"]
