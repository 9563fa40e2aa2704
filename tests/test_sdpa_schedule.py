"""The timetable of the one-pass backward kernel: every pair of tiles once, in an order of additions that never stops."""

from __future__ import annotations

import ctypes
import pathlib
import random
import shutil
import subprocess

import pytest

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("schedule") / "schedule.so"
    source = HERE / "sdpa_schedule_on_cpu.cpp"
    subprocess.run([compiler, "-std=c++17", "-O1", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def run_timetable(library):
    def run(lanes: int, teams: int, heads: int, sharing: int, key_blocks: int, tiles: int, causal: bool) -> tuple[int, int]:
        """Steps (negative: what went wrong) and steps spent waiting, all blocks together."""
        rounds, spacing = -(-key_blocks // lanes), min(2, tiles * sharing // lanes)
        numbers = (ctypes.c_int * 9)(lanes, teams, heads, sharing, key_blocks, tiles, rounds, spacing, causal)
        waits = ctypes.c_int()
        return library.run_timetable(numbers, ctypes.byref(waits)), waits.value

    return run


def test_every_pair_is_added_once_and_nobody_waits_for_ever(run_timetable):
    numbers = random.Random(0)
    for _ in range(3000):
        key_blocks, tiles, heads = numbers.randint(1, 12), numbers.randint(1, 24), numbers.randint(1, 7)
        lanes, teams = numbers.randint(1, key_blocks), numbers.randint(1, heads)
        case = lanes, teams, heads, numbers.choice([1, 1, 2, 3]), key_blocks, tiles, numbers.random() < 0.5
        assert run_timetable(*case)[0] >= 0, case


@pytest.mark.parametrize(
    ("lanes", "teams", "heads", "key_blocks", "tiles", "causal", "steps"),
    [  # as many steps as there are visits of a lane
        (16, 8, 16, 128, 256, True, 2064),
        (16, 8, 16, 128, 256, False, 4096),
        (64, 2, 16, 128, 256, True, 2064),
        (8, 16, 128, 16, 32, True, 272),
        (16, 8, 128, 16, 32, False, 512),
    ],
)
def test_nobody_waits(run_timetable, lanes, teams, heads, key_blocks, tiles, causal, steps):
    assert run_timetable(lanes, teams, heads, 1, key_blocks, tiles, causal) == (steps, 0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("heads", "sharing", "t"), [(16, 1, 16384), (32, 1, 8192), (64, 1, 4096), (8, 4, 4096), (5, 1, 4133), (1, 1, 300)]
)
def test_the_chosen_timetable_keeps_multiprocessors_busy(library, heads: int, sharing: int, t: int, causal: bool) -> None:
    """At most 8 % more steps than 132 multiprocessors would take if work were a liquid."""
    numbers, waits = (ctypes.c_int * 9)(), ctypes.c_int()
    library.choose_timetable(heads, sharing, t, causal, 132, numbers)
    lanes, teams, _, _, key_blocks, tiles, *_ = numbers
    assert 1 <= lanes * teams <= 132
    steps = library.run_timetable(numbers, ctypes.byref(waits))
    visits = heads * sharing * sum(tiles - (2 * j if causal else 0) for j in range(key_blocks))
    assert steps * 132 >= visits
    if heads % 2 == 0:
        assert steps * 132 <= 1.08 * visits
