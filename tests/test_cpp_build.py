"""setup.py: what is compiled when, what a missing tool leads to, spills, and what the binary depends on."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys
import zipfile

import pytest

pytest.importorskip("torch")
pytest.importorskip("setuptools")

ROOT = pathlib.Path(__file__).resolve().parent.parent
CSRC = pathlib.Path("torch_power/csrc")

# Stands in for a compiler: notes what it was asked to compile, and writes an object and its list of dependencies.
FAKE = """#!{python}
import os, pathlib, sys
arguments = sys.argv[1:]
output = pathlib.Path(arguments[arguments.index("-o") + 1])
output.write_text("object")
if "-c" in arguments:
    source = arguments[arguments.index("-c") + 1]
    with open({log!r}, "a") as log:
        log.write(source + "\\n")
    header = {{"cpu": "{csrc}/cpu/gemm.h", "inst": "{csrc}/abi.h"}}.get(pathlib.Path(source).parent.name, "")
    pathlib.Path(arguments[arguments.index("-MF") + 1]).write_text(f"{{output}}: {{source}} {{header}}\\n")
    print(os.environ.get("FAKE_OUTPUT", ""))
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of what setup.py reads, two CUDA sources, and stand-ins for both compilers."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for package in ("bridge", "jax_power", "torch_power"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for source in (tmp_path / CSRC / "inst").glob("*.cu"):
        source.unlink()
    for name in ("one.cu", "two.cu"):
        (tmp_path / CSRC / "inst" / name).write_text("// nothing\n")
    (tmp_path / CSRC / "spills.toml").write_text("")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("c++", "nvcc"):
        tool = tools / name
        tool.write_text(FAKE.format(python=sys.executable, log=str(tmp_path / "log"), csrc=CSRC))
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def build(tree: pathlib.Path, *command: str, check: bool = True, **environment: str) -> tuple[list[str], str]:
    """Run setup.py; what was compiled, and what was printed."""
    (tree / "log").write_text("")
    tools = {"CXX": str(tree / "tools/c++"), "NVCC": str(tree / "tools/nvcc")}
    done = subprocess.run(
        [sys.executable, "setup.py", *(command or ("-q", "build_ext"))],
        cwd=tree, env=os.environ | tools | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert (done.returncode == 0) == check, done.stdout
    return [pathlib.Path(line).name for line in (tree / "log").read_text().split()], done.stdout


def test_only_what_changed_is_compiled_again(tree):
    everything, _ = build(tree)
    assert everything.count("one.cu") == everything.count("two.cu") == everything.count("dispatch.cpp") == 1
    assert everything.count("variant.cpp") in (2, 6)  # arithmetics × instruction sets
    assert build(tree)[0] == []

    (tree / CSRC / "inst/one.cu").write_text("// something else\n")
    assert build(tree)[0] == ["one.cu"]
    (tree / CSRC / "inst/one.cu").touch()  # the same text
    assert build(tree)[0] == []
    (tree / CSRC / "cpu/gemm.h").write_text("// something else\n")
    assert set(build(tree)[0]) == {"variant.cpp", "dispatch.cpp"}
    (tree / "build/objects/cuda_two.o").unlink()
    assert build(tree)[0] == ["two.cu"]


def test_spills_fail_unless_listed(tree):
    report = """ptxas info    : Function properties for _Z6kernelv
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads"""
    _, said = build(tree, check=False, FAKE_OUTPUT=report)
    assert "_Z6kernelv: 12 bytes" in said
    # The report is kept: nothing is compiled again, and the spill is still there.
    assert "_Z6kernelv: 12 bytes" in build(tree, check=False)[1]
    spills = tree / CSRC / "spills.toml"
    spills.write_text('[[spill]]\nkernel = "_Z6kernel.*"\nbytes = 8\nreason = "a test"\n')
    build(tree, check=False)
    spills.write_text('[[spill]]\nkernel = "_Z6kernel.*"\nbytes = 12\nreason = "a test"\n')
    build(tree)


def test_without_nvcc(tree):
    compiled, said = build(tree, POWER_CUDA="0")
    assert "CPU operators only" in said
    assert not [name for name in compiled if name.endswith(".cu") or name == "ffi_binding.cpp"]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"POWER_BUILD": "0"}, "POWER_BUILD=0"), ({"PATH": "/nowhere", "CXX": "/nowhere/c++"}, "no C++ compiler")],
)
def test_pure_python_where_nothing_can_be_built(tree, environment, reason):
    compiled, said = build(tree, "-q", "bdist_wheel", **environment)
    assert compiled == []
    assert said.count("no compiled library") == 1 and reason in said
    (wheel,) = (tree / "dist").glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


def test_wheel_carries_the_libraries(tree):
    build(tree, "-q", "bdist_wheel")
    (wheel,) = (tree / "dist").glob("*.whl")
    assert re.search(r"-cp311-abi3-linux_\w+\.whl$", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert {"torch_power/_C.abi3.so", "torch_power/lib/libpower_kernels.so", "torch_power/cpp/power.py"} <= set(names)
    assert ("torch_power/lib/libpower_ffi.so" in names) == (importlib.util.find_spec("jaxlib") is not None)


def test_failed_compilation_shows_the_compilers_words(tree):
    (tree / "tools/c++").write_text("#!/bin/sh\necho 'error: no such thing'\nexit 1\n")
    _, said = build(tree, check=False, POWER_CUDA="0")
    assert "error: no such thing" in said and "compiling torch_power/csrc" in said


# ---------------------------------------------------------------------------------------------------------------------
# What was built and installed
# ---------------------------------------------------------------------------------------------------------------------


def symbols(library: pathlib.Path, which: str) -> set[str]:
    listed = subprocess.run(["nm", "-D", which, str(library)], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].split("@")[0] for line in listed.splitlines()}


def installed(name: str) -> pathlib.Path:
    path = ROOT / "torch_power" / name
    if not path.exists() or shutil.which("nm") is None:
        pytest.skip("the library was not built here, or there is no nm")
    return path


def test_kernels_need_no_framework():
    library = installed("lib/libpower_kernels.so")
    assert not [name for name in symbols(library, "--undefined-only") if re.search(r"torch|c10|Py[A-Z]|xla", name)]
    exported = symbols(library, "--defined-only")
    assert {"power_attention_forward_cpu", "power_sdpa_backward_cpu", "power_last_error"} <= exported
    assert not [name for name in exported if not name.startswith("power_")]


def test_binding_needs_only_the_stable_interface():
    """No C++ symbol of torch: what is left are the C functions that every torch from 2.11 on keeps."""
    wanted = symbols(installed("_C.abi3.so"), "--undefined-only")
    assert not [name for name in wanted if re.match(r"_ZN?K?(2at|3c10|5torch)", name)]
    assert {"aoti_torch_library_init_fragment", "PyModule_Create2"} <= wanted


def test_stream_is_asked_for_where_torch_has_it():
    """A CPU build of torch has no such function: the binding loads there because the symbol is weak."""
    listed = subprocess.run(["nm", "-D", str(installed("_C.abi3.so"))], capture_output=True, text=True, check=True).stdout
    found = [line.split()[0] for line in listed.splitlines() if line.endswith(" aoti_torch_get_current_cuda_stream")]
    kernels = "power_chunked_forward_sm90" in symbols(installed("lib/libpower_kernels.so"), "--defined-only")
    assert found == (["w"] if kernels else [])


def test_wheel_is_small(tmp_path):
    """Both libraries as built here, compressed as a wheel is: at most 30 MB."""
    with zipfile.ZipFile(tmp_path / "libraries.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("_C.abi3.so", "lib/libpower_kernels.so"):
            archive.write(installed(name), name)
    assert (tmp_path / "libraries.zip").stat().st_size < 30e6


def test_second_torch():
    """POWER_SECOND_PYTHON names another interpreter with another torch: the same files load and compute there.

    On a GPU machine, whose torch is another one, the whole of tests/test_cpp.py says more.
    """
    python = os.environ.get("POWER_SECOND_PYTHON")
    if not python:
        pytest.skip("POWER_SECOND_PYTHON is not set")
    code = """
import torch
torch.ops.load_library("torch_power/_C.abi3.so")
q = torch.randn(1, 9, 2, 16)
y, *_ = torch.ops.torch_power.power_forward_cpp(q, q, q, None, None, None, 2, 1.0, True, True, 0, 9, False)
print(torch.__version__, y.shape)
"""
    done = subprocess.run([python, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 9, 2, 16])" in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# The GPU primitives' own programs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", sorted((ROOT / "tests/gpu/primitives").glob("*.cu")), ids=lambda source: source.stem)
def test_primitives_compile(source, tmp_path):
    """They run on a GPU (tests/gpu/test_primitives.py); that they build, without spills or serialised products, shows here."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    command = [nvcc, "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v", "-cubin"]
    done = subprocess.run(
        [*command, str(source), "-o", str(tmp_path / "cubin")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "Compiling entry function" in done.stdout and "C75" not in done.stdout
    assert set(re.findall(r"(\d+) bytes spill stores", done.stdout)) == {"0"}
