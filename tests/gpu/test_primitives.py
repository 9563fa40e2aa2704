"""The building blocks of csrc/sm90 one by one: each primitives/*.cu is a program that checks itself on the GPU.

They are compiled here if nvcc is; POWER_PRIMITIVES names a folder of programs compiled elsewhere (`make primitives`).
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess

import pytest

SOURCES = sorted((pathlib.Path(__file__).parent / "primitives").glob("*.cu"))
FLAGS = ["-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a"]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Folder of the compiled programs."""
    if folder := os.environ.get("POWER_PRIMITIVES"):
        return pathlib.Path(folder)
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        pytest.skip("no nvcc, and POWER_PRIMITIVES is not set")
    folder = tmp_path_factory.mktemp("primitives")
    running = [subprocess.Popen([nvcc, *FLAGS, str(source), "-o", str(folder / source.stem)]) for source in SOURCES]
    codes = [process.wait() for process in running]
    assert codes == [0] * len(SOURCES)
    return folder


@pytest.mark.parametrize("name", [source.stem for source in SOURCES])
def test_primitive(programs, name):
    done = subprocess.run([programs / name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    assert done.returncode == 0 and "WRONG" not in done.stdout, done.stdout
    assert "ok" in done.stdout
