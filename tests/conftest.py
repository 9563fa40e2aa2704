"""What every test relies on: repeatable examples, and a clean skip where a framework or a GPU is not here."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import os
import pathlib

import hypothesis
import pytest

GPU_TESTS = pathlib.Path(__file__).parent / "gpu"
GPU_HERE = any(pathlib.Path("/dev").glob("nvidia[0-9]*"))

# The framework that a top-level import needs.
NEEDS = {"torch": "torch", "torch_power": "torch", "jax": "jax", "jax_power": "jax"}

# Before any test imports jax: a test that shares the GPU with torch must not find 75% of its memory taken.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # More threads than cores: one that waits must not spin.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# The same examples in every run, so that a failure can be seen again. No deadline: first examples compile.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("repeatable")


@functools.cache
def present(package: str) -> bool:
    """Whether `package` can be imported here, found out without importing it."""
    return importlib.util.find_spec(package) is not None


def compile_quickly() -> None:
    """Have JAX compile for the CPU without optimising, unless the environment says JAX_DISABLE_MOST_OPTIMIZATIONS=0.

    Inputs are small and programs many, so compiling is nearly all that a test of jax_power does. Unoptimised it takes a
    seventh of the time (JAX 0.10) or half (0.12). `make validate` runs the same cases the way users do.
    """
    if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1" and present("jax"):
        flags, flag = os.environ.get("XLA_FLAGS", ""), "--xla_cpu_use_fusion_emitters=false"
        # A later XLA does not know the flag, and aborts
        if flag not in flags and importlib.metadata.version("jaxlib").startswith("0.10."):
            os.environ["XLA_FLAGS"] = f"{flags} {flag}"


if not GPU_HERE:
    compile_quickly()


def missing_framework(path: pathlib.Path) -> str | None:
    """The framework that the test file at `path` imports at its top level and that is not installed, or None."""
    for node in ast.parse(path.read_text(encoding="utf-8"), filename=str(path)).body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            names = [node.module]
        for name in names:
            framework = NEEDS.get(name.partition(".")[0])
            if framework is not None and not present(framework):
                return framework
    return None


class SkippedModule(pytest.Module):
    """A test file that is reported as skipped and never imported."""

    def collect(self):
        pytest.skip(f"needs {missing_framework(self.path)}, which is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: pathlib.Path, parent: pytest.Collector) -> pytest.Module | None:
    if missing_framework(module_path) is not None:
        return SkippedModule.from_parent(parent, path=module_path)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if GPU_TESTS in item.path.parents or item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.gpu)
            if not GPU_HERE:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
