"""Each twin stands alone: importing one never imports the other's framework, nor needs it to be importable.

Every check runs in a fresh interpreter, since this one may have imported anything.
"""

from __future__ import annotations

import importlib.util
import pathlib
import pkgutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Which frameworks each package may import.
ALLOWED = {"jax_power": {"jax"}, "torch_power": {"torch"}, "bridge": set()}
FRAMEWORKS = {"jax", "torch"}

BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240, check=False)


def skip_without(packages: set[str]) -> None:
    for package in sorted(packages):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}, which is not installed")


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_import_brings_no_other_framework(package):
    skip_without(ALLOWED[package])
    result = run(f"import sys, {package}; print(*sys.modules)")
    assert result.returncode == 0, result.stderr
    assert not set(result.stdout.split()) & (FRAMEWORKS - ALLOWED[package])


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_import_needs_no_other_framework(package):
    skip_without(ALLOWED[package])
    blocked = FRAMEWORKS - ALLOWED[package]
    result = run(BLOCK.format(blocked=blocked) + f"import {package}")
    assert result.returncode == 0, result.stderr


def test_block_blocks():
    """The check above would fail: with jax blocked, importing jax does."""
    result = run(BLOCK.format(blocked={"jax"}) + "import jax")
    assert result.returncode != 0
    assert "No module named 'jax'" in result.stderr


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_every_module_imports_without_the_other_framework(package):
    """Also the modules that the package itself does not import (implementations, layers, the validation)."""
    skip_without(ALLOWED[package] | ({"absl", "matplotlib", "rich", "safetensors"} if package == "bridge" else set()))
    names = [module.name for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}.")]
    assert names
    blocked = FRAMEWORKS - ALLOWED[package]
    result = run(BLOCK.format(blocked=blocked) + "".join(f"import {name}\n" for name in names))
    assert result.returncode == 0, result.stderr
