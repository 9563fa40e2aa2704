"""The fused implementation for Hopper GPUs: CUDA kernels behind `csrc/abi.h`."""

from torch_power.cuda import power

__all__ = ["power"]
