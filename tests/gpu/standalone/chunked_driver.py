"""The chunked sm90 entry points on torch tensors through ctypes, and a float64 oracle on the GPU. No part of the package.

nvcc … -shared -o .carry/libchunked.so torch_power/csrc/inst/chunked_*.cu     (or any library that exports abi_chunked.h)
"""

from __future__ import annotations

import ctypes
import math

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4}


class Array(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 4), ("dtype", ctypes.c_int32)]


class Shape(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int64) for n in ("b", "t", "t_kv", "h_q", "h_kv", "d", "e", "chunk_size")]
    _fields_ += [("scale", ctypes.c_double)]
    _fields_ += [(n, ctypes.c_int32) for n in ("deg", "form", "dtype", "causal", "normalize", "saved", "gates")]


NAMES = "q k v log_g s0 z0 y norm s z dy ds dz dq dk dv dlog_g ds0 dz0 saved".split()


class Arrays(ctypes.Structure):
    _fields_ = [(n, Array) for n in NAMES]


def library(path: str) -> ctypes.CDLL:
    lib = ctypes.CDLL(path)
    lib.power_last_error.restype = ctypes.c_char_p
    for name in ("saved", "forward_workspace", "backward_workspace"):
        getattr(lib, f"power_chunked_{name}_sm90").restype = ctypes.c_int64
    return lib


def arrays(**tensors: torch.Tensor | None) -> Arrays:
    """Fill the struct; a name that is missing or None becomes an absent array."""
    out = Arrays()
    for name, x in tensors.items():
        if x is not None:
            getattr(out, name).data = x.data_ptr()
            getattr(out, name).dtype = DTYPES[x.dtype]
            for i, stride in enumerate(x.stride()):
                getattr(out, name).stride[i] = stride
    return out


def make_shape(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, normalize: bool) -> Shape:
    b, t, h_q, d = q.shape
    scale = 1 / math.sqrt(d) if scale is None else scale
    return Shape(b, t, t, h_q, k.shape[2], d, v.shape[3], 1, scale, 2, 1, DTYPES[q.dtype], 1, int(normalize))


class Runner:
    """One pass of one shape: allocates outputs (poisoned with NaN) and workspace once, then launches."""

    def __init__(self, lib: ctypes.CDLL, pass_: str, shape: Shape, tensors: dict):
        self.lib, self.pass_, self.shape, self.tensors = lib, pass_, shape, tensors
        self.bytes = getattr(lib, f"power_chunked_{pass_}_workspace_sm90")(ctypes.byref(shape), None)
        if self.bytes < 0:
            raise NotImplementedError(lib.power_last_error().decode())
        self.workspace = torch.full((self.bytes,), 255, dtype=torch.uint8, device="cuda")
        self.arrays = arrays(**tensors)

    def __call__(self) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = getattr(self.lib, f"power_chunked_{self.pass_}_sm90")(
            ctypes.byref(self.shape),
            ctypes.byref(self.arrays),
            ctypes.c_void_p(self.workspace.data_ptr()),
            ctypes.c_int64(self.bytes),
            stream,
        )
        if status:
            raise RuntimeError(f"status {status}: {self.lib.power_last_error().decode()}")


def state_rows(d: int) -> int:
    return (d // 8) * (d // 8 + 1) // 2 * 64


def forward(lib, q, k, v, log_g=None, s0=None, z0=None, *, scale=None, normalize=True, return_state=True, saved=True) -> Runner:
    def poisoned(*size, dtype=torch.float32):
        return torch.full(size, math.nan, dtype=dtype, device="cuda")

    b, t, h_q, d = q.shape
    h_kv, e = v.shape[2:]
    out = {"y": poisoned(b, t, h_q, e, dtype=v.dtype), "norm": poisoned(b, t, h_q)}
    if return_state:
        out |= {"s": poisoned(b, h_kv, state_rows(d), e), "z": poisoned(b, h_kv, state_rows(d))}
    shape = make_shape(q, k, v, scale, normalize)
    shape.saved = int(saved)
    if saved:
        size = lib.power_chunked_saved_sm90(ctypes.byref(shape), None)
        out["saved"] = torch.full((size,), 255, dtype=torch.uint8, device="cuda")
    tensors = {"q": q, "k": k, "v": v, "log_g": log_g, "s0": s0, "z0": z0, **out}
    return Runner(lib, "forward", shape, tensors)


def backward(lib, fwd: Runner, dy, ds=None, dz=None, *, saved=True) -> Runner:
    x = dict(fwd.tensors)
    if not saved:
        x.pop("saved", None)
    grads = {f"d{n}": torch.full_like(x[n], math.nan) for n in ("q", "k", "v", "log_g", "s0", "z0") if x[n] is not None}
    shape = Shape.from_buffer_copy(fwd.shape)
    shape.saved = int("saved" in x)
    return Runner(lib, "backward", shape, {**x, "dy": dy, "ds": ds, "dz": dz, **grads})


# -- oracle -----------------------------------------------------------------------------------------------------------


def features(x: torch.Tensor, *, multiplicity: bool) -> torch.Tensor:
    """φ or ψ of the last axis, in the public layout."""
    d = x.shape[-1]
    blocks = []
    for i in range(d // 8):
        for j in range(i, d // 8):
            block = (x[..., 8 * i : 8 * i + 8, None] * x[..., None, 8 * j : 8 * j + 8]).flatten(-2)
            blocks.append(block * (2 if multiplicity and i != j else 1))
    return torch.cat(blocks, -1)


def oracle(q, k, v, log_g=None, s0=None, z0=None, *, scale=None, normalize=True):
    """y, s, z by the O(t²) sum in float64, differentiable."""
    b, t, h_q, d = q.shape
    h_kv = k.shape[2]
    scale = 1 / math.sqrt(d) if scale is None else scale
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    g = (
        torch.zeros(b, h_kv, t, dtype=torch.float64, device=q.device)
        if log_g is None
        else log_g.double().transpose(1, 2).cumsum(-1)
    )
    k_q, v_q, g_q = (x.repeat_interleave(h_q // h_kv, 1) for x in (k, v, g))
    mask = torch.ones(t, t, dtype=torch.bool, device=q.device).tril()
    gates = (g_q[..., :, None] - g_q[..., None, :]).masked_fill(~mask, -math.inf).exp()
    w = (scale * q @ k_q.transpose(-1, -2)) ** 2 * gates
    num, den = w @ v_q, w.sum(-1)
    if s0 is not None:
        psi = features(scale * q, multiplicity=True) * g_q.exp()[..., None]
        num = num + psi @ s0.double().repeat_interleave(h_q // h_kv, 1)
        den = den + (psi * z0.double().repeat_interleave(h_q // h_kv, 1)[..., None, :]).sum(-1)
    y = num / den[..., None] if normalize else num
    phi = features(k, multiplicity=False) * (g[..., -1:] - g).exp()[..., None]
    s, z = phi.transpose(-1, -2) @ v, phi.sum(-2)
    if s0 is not None:
        last = g[..., -1].exp()
        s, z = s + last[..., None, None] * s0.double(), z + last[..., None] * z0.double()
    return y.transpose(1, 2), s, z


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm()) if want.norm() > 0 else float(got.norm())


def make(b, t, h_q, h_kv, d, e, dtype=torch.bfloat16, gates="mild", state=False, seed=0, deviation=1.0):
    """Random inputs; gates: None, 'mild' (mean −0.05), 'strong' (−50 and −0.01 mixed)."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, device="cuda")

    q, k = (normal(b, t, h, d).mul(deviation).to(dtype) for h in (h_q, h_kv))
    v = normal(b, t, h_kv, e).to(dtype)
    log_g = None
    if gates == "mild":
        log_g = torch.nn.functional.logsigmoid(3 + normal(b, t, h_kv))
    elif gates == "strong":
        log_g = torch.where(torch.rand(b, t, h_kv, generator=generator, device="cuda") < 0.1, -50.0, -0.01)
    s0 = z0 = None
    if state:
        x, u = normal(b, h_kv, 100, d), normal(b, h_kv, 100, e)
        phi = features(x, multiplicity=False)
        s0, z0 = (phi.transpose(-1, -2) @ u).contiguous(), phi.sum(-2).contiguous()
    return q, k, v, log_g, s0, z0


def milliseconds(run, repeats=20) -> float:
    """Median of `repeats` timed runs after three."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def kernel_times(run) -> dict[str, float]:
    """Milliseconds of each kernel of one call, by torch's profiler."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            run()
        torch.cuda.synchronize()
    return {
        e.key.rsplit("(", 1)[0].replace("void ", "").replace("power::", ""): round(e.self_device_time_total / 5000, 4)
        for e in profile.key_averages()
        if e.self_device_time_total
    }
