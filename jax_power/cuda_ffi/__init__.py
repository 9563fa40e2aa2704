"""The fused implementation for Hopper GPUs: CUDA kernels behind `csrc/abi.h`, called by XLA. The twin of `torch_power.cuda`."""

from jax_power.cuda_ffi import power

__all__ = ["power"]
