"""The fused implementation for Hopper GPUs: CUDA kernels behind `csrc/abi.h`."""

from torch_power.cuda import power, sdpa

__all__ = ["power", "sdpa"]
