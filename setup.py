r"""Builds the compiled library of torch_power, where it can be built; everything else is in pyproject.toml.

Two shared libraries come out, three where jax is installed and nvcc is:

    torch_power/lib/libpower_kernels.so   The kernels behind csrc/abi.h, without a torch symbol: C++ for CPU threads (one
                                          object for each instruction set and arithmetic) and, where nvcc is,
                                          csrc/inst/*.cu for sm_90a.
    torch_power/_C.abi3.so                Their PyTorch operators, on torch's stable ABI: one wheel for Python ≥ 3.11
                                          and torch ≥ 2.11.
    torch_power/lib/libpower_ffi.so       Their XLA handlers, for jax_power (csrc/ffi_binding.cpp). XLA keeps to its side of
                                          the interface for a year, so headers of an older jaxlib serve newer ones.

Without torch or without a C++ compiler the package installs as pure Python; without nvcc it has CPU operators only.
Each is said in one line. Objects are kept in build/objects with a record of the command and the files they were made
from, so that a second build compiles only what changed. The report of ptxas on every .cu is kept beside its object,
and the build fails when a kernel spills registers and csrc/spills.toml does not allow it.

Environment:
    POWER_BUILD=0      install pure Python even where the library could be built
    POWER_CUDA=0       leave the CUDA kernels out even where nvcc is
    POWER_SANITIZE=1   AddressSanitizer and UndefinedBehaviorSanitizer in everything but the CUDA kernels
                       (`make test-sanitize` builds that in a copy and runs the tests on it)
    MAX_JOBS=N         compile N files at a time (default: as many as cores and memory allow)
    NVCC=path          nvcc, when it is neither on PATH nor under CUDA_HOME or /usr/local/cuda
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
import time
import tomllib

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).resolve().parent
CSRC = pathlib.Path("torch_power/csrc")
OBJECTS = pathlib.Path("build/objects")
KERNELS, HANDLERS = "libpower_kernels.so", "libpower_ffi.so"
SANITIZE = os.environ.get("POWER_SANITIZE") == "1"

# torch 2.11, the oldest supported: headers offer nothing newer, and what is compiled loads there and on later ones.
TORCH_TARGET = "0x020b000000000000"

CXX_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
CXX_FLAGS += ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"] if SANITIZE else ["-O3"]
NVCC_FLAGS = [
    "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "--expt-relaxed-constexpr", "-Xfatbin", "-compress-all",
    "-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden",
]  # fmt: skip

# Instruction set → vector bytes and flags. Which one runs is decided when the library is loaded.
ISAS = {"generic": (16, [])}
if platform.machine() in ("x86_64", "AMD64"):
    AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"]
    ISAS["avx2"] = (32, ["-mavx2", "-mfma", "-mf16c"])
    ISAS["avx512"] = (64, ["-mavx2", "-mfma", "-mf16c", *AVX512])

# What one compilation needs at its worst; bounds how many run at once.
CXX_GIGABYTES, NVCC_GIGABYTES = 0.7, 2.0


@dataclasses.dataclass(frozen=True)
class Compilation:
    """One source file to one object: `command` lacks only the depfile and output arguments."""

    source: pathlib.Path
    output: pathlib.Path
    command: tuple[str, ...]
    gigabytes: float

    @property
    def record(self) -> pathlib.Path:
        return self.output.with_suffix(".json")

    @property
    def log(self) -> pathlib.Path:
        return self.output.with_suffix(".log")

    def fresh(self) -> bool:
        """Whether the object exists and was made by this very command from files that have not changed since."""
        try:
            record = json.loads(self.record.read_text())
            same_command = record["command"] == list(self.command)
            return self.output.exists() and same_command and record["inputs"] == _digests(record["inputs"])
        except (OSError, ValueError, KeyError):
            return False

    def run(self) -> None:
        begin = time.time()
        depfile = self.output.with_suffix(".d")
        self.record.unlink(missing_ok=True)
        command = [*self.command, "-MD", "-MF", str(depfile), "-c", str(self.source), "-o", str(self.output)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.log.write_text(done.stdout)
        if done.returncode:
            raise RuntimeError(f"compiling {self.source} failed:\n{shlex.join(command)}\n{done.stdout}")
        words = depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        if all(pathlib.Path(word).stat().st_mtime < begin for word in words):  # else a file changed meanwhile: no record
            self.record.write_text(json.dumps({"command": list(self.command), "inputs": _digests(words)}))


def _digests(paths) -> dict[str, str]:
    return {str(path): hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest() for path in paths}


def _available_gigabytes() -> float:
    try:
        return int(re.search(r"MemAvailable:\s+(\d+)", pathlib.Path("/proc/meminfo").read_text())[1]) / 2**20
    except (OSError, TypeError):
        return 4.0


def _jobs(gigabytes: float) -> int:
    if "MAX_JOBS" in os.environ:
        return max(1, int(os.environ["MAX_JOBS"]))
    return max(1, min(len(os.sched_getaffinity(0)), int(_available_gigabytes() / gigabytes)))


def compile_all(compilations: list[Compilation]) -> None:
    """Bring every object up to date, the largest sources first, as many at a time as cores and memory allow."""
    stale = [c for c in compilations if not c.fresh()]
    if not stale:
        return
    print(f"torch_power: compiling {len(stale)} of {len(compilations)} files", flush=True)
    with concurrent.futures.ThreadPoolExecutor(_jobs(max(c.gigabytes for c in stale))) as pool:
        for done in concurrent.futures.as_completed([pool.submit(c.run) for c in stale]):
            done.result()


def find_compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


def find_nvcc() -> str | None:
    """nvcc, unless CUDA kernels are not wanted or there are none."""
    if os.environ.get("POWER_CUDA") == "0" or not list((ROOT / CSRC / "inst").glob("*.cu")):
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")


def cpu_compilations(cxx: str, with_cuda: bool) -> list[Compilation]:
    flags = [*CXX_FLAGS, "-fno-exceptions", "-fno-rtti", "-Wno-psabi"]

    def make(source: str, name: str, *extra: str) -> Compilation:
        return Compilation(CSRC / "cpu" / source, OBJECTS / f"{name}.o", (cxx, *flags, *extra), CXX_GIGABYTES)

    table = [
        make("variant.cpp", f"cpu_{isa}_{variant}", *arch, f"-DPOWER_ISA={isa}", f"-DPOWER_VECTOR_BYTES={size}",
             f"-DPOWER_REAL={real}", f"-DPOWER_VARIANT={variant}")
        for isa, (size, arch) in ISAS.items()
        for real, variant in (("float", "in_float32"), ("double", "in_float64"))
    ]  # fmt: skip
    return [*table, make("dispatch.cpp", "cpu_dispatch", *(["-DPOWER_WITH_SM90"] if with_cuda else []))]


def cuda_compilations(nvcc: str) -> list[Compilation]:
    return [
        Compilation(source, OBJECTS / f"cuda_{source.stem}.o", (nvcc, *NVCC_FLAGS), NVCC_GIGABYTES)
        for source in sorted((CSRC / "inst").glob("*.cu"))
    ]


def torch_compilations(cxx: str, with_cuda: bool) -> list[Compilation]:
    from torch.utils.cpp_extension import include_paths

    includes = [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
    defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-DUSE_CUDA"]
    return [
        Compilation(source, OBJECTS / f"{source.stem}.o", (cxx, *CXX_FLAGS, *defines, *includes), CXX_GIGABYTES)
        for source in sorted(CSRC.glob("torch_binding*.cpp"))
        if with_cuda or source.stem != "torch_binding_cuda"
    ]


def ffi_compilations(cxx: str) -> list[Compilation]:
    """The XLA handlers; none where jaxlib, which brings the headers, is not installed."""
    found = importlib.util.find_spec("jaxlib")
    if found is None:
        return []
    include = pathlib.Path(found.submodule_search_locations[0]) / "include"
    source = CSRC / "ffi_binding.cpp"
    return [Compilation(source, OBJECTS / f"{source.stem}.o", (cxx, *CXX_FLAGS, f"-isystem{include}"), CXX_GIGABYTES)]


def check_spills(compilations: list[Compilation]) -> None:
    """Raise if ptxas spilled registers in a kernel that csrc/spills.toml does not list with at least as many bytes."""
    allowed = tomllib.loads((CSRC / "spills.toml").read_text())
    found = {}
    for compilation in compilations:
        function = None
        for line in compilation.log.read_text().splitlines():
            if entry := re.search(r"Compiling entry function '(\w+)'|Function properties for (\w+)", line):
                function = entry[1] or entry[2]
            elif spill := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
                if int(spill[1]) or int(spill[2]):
                    found[function] = max(int(spill[1]), int(spill[2]))
    limits = {row["kernel"]: row["bytes"] for row in allowed.get("spill", [])}
    over = [
        f"{kernel}: {size} bytes" for kernel, size in found.items()
        if not any(re.fullmatch(pattern, kernel) and size <= most for pattern, most in limits.items())
    ]  # fmt: skip
    if over:
        raise RuntimeError("kernels spill registers that torch_power/csrc/spills.toml does not allow:\n" + "\n".join(over))


def link(cxx: str, objects: list[Compilation], output: pathlib.Path, arguments: list[str]) -> None:
    """Link into a new file that then replaces the old one, which a running process may have loaded."""
    output.parent.mkdir(parents=True, exist_ok=True)
    fresh = output.with_suffix(".new")
    sanitizers = ["-fsanitize=address,undefined"] if SANITIZE else ["-s"]
    command = [cxx, "-shared", *sanitizers, *(str(x.output) for x in objects), *arguments, "-o", str(fresh)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"linking {output} failed:\n{shlex.join(command)}\n{done.stdout}")
    fresh.replace(output)


class BuildLibrary(build_ext):
    """Both shared libraries, in place of setuptools' own compilation of the extension."""

    def build_extension(self, ext: Extension) -> None:
        os.chdir(ROOT)
        OBJECTS.mkdir(parents=True, exist_ok=True)
        cxx, nvcc = find_compiler(), find_nvcc()
        if nvcc is None:
            print("torch_power: CPU operators only (no nvcc, or POWER_CUDA=0)", flush=True)
        cpu, cuda = cpu_compilations(cxx, nvcc is not None), cuda_compilations(nvcc) if nvcc else []
        binding, handlers = torch_compilations(cxx, nvcc is not None), ffi_compilations(cxx) if nvcc else []
        compile_all(cuda)
        compile_all([*cpu, *binding, *handlers])
        check_spills(cuda)

        extension = pathlib.Path(self.get_ext_fullpath(ext.name))
        libraries = extension.parent / "lib"
        link(cxx, [*cpu, *cuda], libraries / KERNELS, self.cuda_arguments(nvcc) if nvcc else [])
        if handlers:
            link(cxx, handlers, libraries / HANDLERS, [f"-L{libraries}", "-lpower_kernels", "-Wl,-rpath,$ORIGIN"])
        import torch

        torch_libraries = pathlib.Path(torch.__file__).parent / "lib"
        link(cxx, binding, extension, [
            f"-L{libraries}", "-lpower_kernels", "-Wl,-rpath,$ORIGIN/lib",
            f"-L{torch_libraries}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu",
        ])  # fmt: skip

    def copy_extensions_to_source(self) -> None:
        """An editable install runs from the source tree: the libraries without Python's name go there too."""
        super().copy_extensions_to_source()
        folder = ROOT / "torch_power" / "lib"
        folder.mkdir(exist_ok=True)
        for library in (pathlib.Path(self.build_lib) / "torch_power/lib").glob("*.so"):
            shutil.copyfile(library, folder / "new.so")
            (folder / "new.so").replace(folder / library.name)  # another file than one a running process may have loaded

    @staticmethod
    def cuda_arguments(nvcc: str) -> list[str]:
        # nvcc itself says where its toolkit is: what is found on PATH may be a script that calls it from elsewhere.
        dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.+)$", dry_run.stdout + dry_run.stderr, flags=re.MULTILINE)
        home = pathlib.Path(top[1].strip() if top else pathlib.Path(nvcc).parent.parent).resolve()
        folders = [home / x for x in ("lib64", "lib", "targets/x86_64-linux/lib") if (home / x / "libcudart_static.a").exists()]
        return [*(f"-L{x}" for x in folders), "-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]


def why_pure_python() -> str | None:
    """None if the library can be built, else the reason why not."""
    if os.environ.get("POWER_BUILD") == "0":
        return "POWER_BUILD=0"
    if sysconfig.get_platform().split("-")[0] != "linux":
        return f"only Linux is supported, this is {sysconfig.get_platform()}"
    if find_compiler() is None:
        return "no C++ compiler (CXX, c++ or g++)"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError:
        return "torch is not installed (or the build is isolated: pip install --no-build-isolation)"
    return None


reason = why_pure_python()
if reason:
    print(f"torch_power: no compiled library: {reason}", flush=True)
    setup()
else:
    setup(
        ext_modules=[Extension("torch_power._C", sources=[], py_limited_api=True)],
        cmdclass={"build_ext": BuildLibrary},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
