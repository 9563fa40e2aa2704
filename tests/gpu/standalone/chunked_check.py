"""Correctness of the chunked kernels against float64, and times.

python chunked_check.py LIBRARY [check] [small] [once] [sanitize] [time] [wide] [forward] [FILE.json]
"""

from __future__ import annotations

import json
import sys

import chunked_driver as driver
import torch

CASES = {
    "one block": {"b": 1, "t": 256, "h_q": 1, "h_kv": 1, "d": 64, "e": 64, "gates": None},
    "two chunks": {"b": 1, "t": 600, "h_q": 1, "h_kv": 1, "d": 64, "e": 64, "gates": None},
    "gates": {"b": 2, "t": 1100, "h_q": 2, "h_kv": 2, "d": 64, "e": 64},
    "state": {"b": 1, "t": 700, "h_q": 2, "h_kv": 2, "d": 64, "e": 64, "state": True},
    "groups, odd t": {"b": 1, "t": 1333, "h_q": 6, "h_kv": 2, "d": 64, "e": 64, "state": True},
    "strong gates": {"b": 1, "t": 1500, "h_q": 2, "h_kv": 2, "d": 64, "e": 64, "gates": "strong", "state": True},
    "float16 of deviation 8": {
        "b": 1,
        "t": 4096,
        "h_q": 1,
        "h_kv": 1,
        "d": 64,
        "e": 64,
        "dtype": torch.float16,
        "deviation": 8.0,
    },
    "float16": {"b": 1, "t": 3000, "h_q": 2, "h_kv": 1, "d": 64, "e": 64, "dtype": torch.float16},
    "t = 1": {"b": 2, "t": 1, "h_q": 2, "h_kv": 2, "d": 64, "e": 64, "state": True},
    "d = 32, e = 40": {"b": 1, "t": 1000, "h_q": 2, "h_kv": 2, "d": 32, "e": 40, "state": True},
    "d = 128": {"b": 1, "t": 1100, "h_q": 2, "h_kv": 2, "d": 128, "e": 128, "state": True},
    "d = 96, e = 64": {"b": 1, "t": 1100, "h_q": 1, "h_kv": 1, "d": 96, "e": 64, "state": True},
    "d = 64, e = 128": {"b": 1, "t": 1100, "h_q": 1, "h_kv": 1, "d": 64, "e": 128, "state": True},
    "t = 4096": {"b": 1, "t": 4096, "h_q": 2, "h_kv": 2, "d": 64, "e": 64},
    "sum, not mean": {"b": 1, "t": 1100, "h_q": 2, "h_kv": 2, "d": 64, "e": 64, "state": True, "normalize": False},
}


def check_case(lib, name, normalize=True, backward=True, **case):
    inputs = driver.make(**case)
    fwd = driver.forward(lib, *inputs, normalize=normalize)
    fwd()
    torch.cuda.synchronize()
    if not backward:
        with torch.no_grad():
            want = driver.oracle(*inputs, normalize=normalize)
        got = [fwd.tensors[n] for n in "ysz"]
        errors = {n: driver.error(g, w) for n, g, w in zip("ysz", got, want, strict=True)}
    else:
        leaves = [None if x is None else x.double().requires_grad_() for x in inputs]
        want = driver.oracle(*leaves, normalize=normalize)
        errors = {n: driver.error(fwd.tensors[n], w.detach()) for n, w in zip("ysz", want, strict=True)}
        generator = torch.Generator("cuda").manual_seed(1)
        upstream = [torch.randn(w.shape, generator=generator, device="cuda") for w in want]
        upstream[0] = upstream[0].to(inputs[0].dtype)
        scale = float(want[1].detach().norm() / want[0].detach().norm())
        upstream[1], upstream[2] = upstream[1] / scale, upstream[2] / scale
        if not case.get("state"):
            upstream[1] = upstream[2] = None
        bwd = driver.backward(lib, fwd, *upstream)
        bwd()
        torch.cuda.synchronize()
        first = {n: bwd.tensors[f"d{n}"].clone() for n in ("q", "k", "v", "log_g", "s0", "z0") if f"d{n}" in bwd.tensors}
        bwd()
        torch.cuda.synchronize()
        again = driver.backward(lib, fwd, *upstream, saved=False)
        again()
        torch.cuda.synchronize()
        same = all(
            torch.equal(x.view(torch.uint8), y.tensors[f"d{n}"].view(torch.uint8))
            for n, x in first.items()
            for y in (bwd, again)
        )
        torch.autograd.backward(
            *zip(*((w, u.double()) for w, u in zip(want, upstream, strict=True) if u is not None), strict=True)
        )
        for n, leaf in zip(("q", "k", "v", "log_g", "s0", "z0"), leaves, strict=True):
            if leaf is not None:
                errors[f"d{n}"] = driver.error(first[n], leaf.grad)
        errors["bit-equal"] = float(not same)
    worst = ", ".join(f"{n} {e:.2e}" for n, e in errors.items())
    print(f"{name:24s} {worst}", flush=True)
    return errors


def time_case(lib, b, t, h, d, gates="mild", dtype=torch.bfloat16, backward=True, rows=48):
    q, k, v, log_g, *_ = driver.make(b, t, h, h, d, d, dtype=dtype, gates=gates)
    fwd = driver.forward(lib, q, k, v, log_g, return_state=False)
    fwd()
    torch.cuda.synchronize()
    # exact rows: the last ones and random ones of one head
    picked = torch.cat([torch.randint(0, t, (rows,), device="cuda"), torch.arange(t - 8, t, device="cuda")])
    kk, vv, qq = k[0, :, 0].double(), v[0, :, 0].double(), q[0, picked, 0].double()
    g = torch.zeros(t, device="cuda", dtype=torch.float64) if log_g is None else log_g[0, :, 0].double().cumsum(0)
    w = (qq @ kk.T) ** 2 * (g[picked, None] - g).masked_fill(torch.arange(t, device="cuda") > picked[:, None], -torch.inf).exp()
    err = driver.error(fwd.tensors["y"][0, picked, 0], w @ vv / w.sum(1, keepdim=True))
    result = {"b": b, "t": t, "h": h, "d": d, "error": err, "forward": driver.milliseconds(fwd), "forward_workspace": fwd.bytes}
    print(
        f"b{b} t{t} h{h} d{d}: error {err:.2e}, forward {result['forward']:.3f} ms, workspace {fwd.bytes >> 20} MB",
        flush=True,
    )
    print("   ", driver.kernel_times(fwd), flush=True)
    if backward:
        fwd.workspace = None
        for saved in (False, True):
            bwd = driver.backward(lib, fwd, torch.randn_like(v), saved=saved)
            bwd()
            torch.cuda.synchronize()
            name = "backward, states saved" if saved else "backward"
            result |= {name: driver.milliseconds(bwd), f"{name}, workspace": bwd.bytes}
            print(f"    {name} {result[name]:.3f} ms, workspace {bwd.bytes >> 20} MB", flush=True)
        print("   ", driver.kernel_times(bwd), flush=True)
    return result


def main() -> None:
    lib = driver.library(sys.argv[1])
    backward = hasattr(lib, "power_chunked_backward_sm90") and "forward" not in sys.argv
    results = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    if "small" in sys.argv:
        results["small"] = [check_case(lib, n, backward=backward, **CASES[n]) for n in ("two chunks", "state")]
    if "check" in sys.argv:
        results["check"] = {}
        for name, case in CASES.items():
            try:
                results["check"][name] = check_case(lib, name, backward=backward, **case)
            except RuntimeError as problem:
                print(f"{name:24s} {problem}")
    if "once" in sys.argv:  # for a profiler
        fwd = driver.forward(lib, *driver.make(1, 65536, 8, 8, 64, 64), return_state=False)
        fwd()
        if backward:
            driver.backward(lib, fwd, torch.randn_like(fwd.tensors["v"]))()
        torch.cuda.synchronize()
    if "sanitize" in sys.argv:  # under compute-sanitizer: kernels of the package and no reference
        for d in (64, 128):
            fwd = driver.forward(lib, *driver.make(1, 900, 2, 1, d, d, state=True))
            fwd()
            driver.backward(lib, fwd, torch.randn_like(fwd.tensors["y"]), *(torch.randn_like(fwd.tensors[n]) for n in "sz"))()
            torch.cuda.synchronize()
            print(f"d = {d} done", flush=True)
    if "time" in sys.argv:
        results["time"] = [
            time_case(lib, *shape, backward=backward)
            for shape in ((1, 65536, 8, 64), (1, 16384, 8, 64), (1, 65536, 8, 128))
            if shape[3] == 64 or "flagship" not in sys.argv
        ]
    if sys.argv[-1].endswith(".json"):
        with open(sys.argv[-1], "w") as f:
            json.dump(results, f, indent=1)


if __name__ == "__main__":
    main()
