"""The compiled library: where it is, and why not when it is not.

Importing `torch_power._C` registers the C++ operators `torch.ops.torch_power.*_cpp` and `*_cuda`; it links
`lib/libpower_kernels.so`, the kernels behind `csrc/abi.h`, which needs no torch and may be loaded on its own (through
ctypes or `jax.ffi`).
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import pathlib

import torch

HOW_TO_BUILD = "build it with: pip install --no-build-isolation . (a C++ compiler and torch must be installed)"

_FOLDER = pathlib.Path(__file__).resolve().parent


def kernels_path() -> pathlib.Path:
    """The kernel library: the file that POWER_KERNELS names, or the installed one (which may not exist)."""
    return pathlib.Path(os.environ.get("POWER_KERNELS") or _FOLDER / "lib" / "libpower_kernels.so")


@torch.compiler.assume_constant_result  # torch.compile cannot look at files, and warns of a cache
def missing() -> str | None:
    """Load the operators, once. None when they are there, else the reason why not and how to get them."""
    return _load()


@functools.cache
def _load() -> str | None:
    if not (_FOLDER / "_C.abi3.so").exists():
        return f"the compiled library is not installed; {HOW_TO_BUILD}"
    try:
        if "POWER_KERNELS" in os.environ:
            ctypes.CDLL(str(kernels_path()), ctypes.RTLD_GLOBAL)  # its symbols come before those of the installed library
        importlib.import_module("torch_power._C")
    except (ImportError, OSError) as error:
        return f"the compiled library does not load ({error}); {HOW_TO_BUILD}"
    return None


def cpu_isa() -> str:
    """The instruction set that the CPU kernels chose on this machine: 'avx512', 'avx2' or 'generic'.

    Raises:
      ImportError: the compiled library is not there.
    """
    reason = missing()
    if reason:
        raise ImportError(reason)
    library = ctypes.CDLL(str(kernels_path()))
    library.power_cpu_isa.restype = ctypes.c_char_p
    return library.power_cpu_isa().decode()
