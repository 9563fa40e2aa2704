"""The order in which persistent blocks are dealt their items (csrc/power/attention_deck.h), compiled for the host."""

from __future__ import annotations

import ctypes
import pathlib
import shutil
import subprocess

import pytest

DECK = pathlib.Path(__file__).resolve().parent.parent / "torch_power/csrc/power/attention_deck.h"
COMPILER = shutil.which("c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

SOURCE = f"""
#include "{DECK}"
using namespace power::attention;
extern "C" void deal(int tiles, int heads, int batches, int together, int last_first, int index, int *item) {{
  const Item x = Deck(tiles, heads, batches, together, last_first, nullptr).item(index);
  item[0] = x.head, item[1] = x.batch, item[2] = x.tile;
}}
"""


@pytest.fixture(scope="module")
def deck(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("deck")
    (folder / "deck.cpp").write_text(SOURCE)
    assert COMPILER is not None
    subprocess.run([COMPILER, "-std=c++17", "-shared", "-fPIC", "deck.cpp", "-o", "deck.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "deck.so"))


@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize(
    ("tiles", "heads", "batches", "together"),
    [(64, 3, 2, 2), (63, 2, 1, 2), (8, 5, 3, 4), (7, 4, 1, 1), (1, 1, 2, 2), (3, 7, 5, 35)],
)
def test_every_item_once_and_a_group_longest_first(
    deck: ctypes.CDLL, tiles: int, heads: int, batches: int, together: int, last_first: bool
) -> None:
    item, dealt = (ctypes.c_int * 3)(), []
    for index in range(tiles * heads * batches):
        deck.deal(tiles, heads, batches, together, last_first, index, item)
        dealt.append(tuple(item))
    assert sorted(dealt) == sorted((h, b, m) for h in range(heads) for b in range(batches) for m in range(tiles))
    for first in range(0, len(dealt), tiles * together):
        group = dealt[first : first + tiles * together]
        assert len({(head, batch) for head, batch, _ in group}) == len(group) // tiles  # whole heads
        assert [tile for *_, tile in group] == sorted((tile for *_, tile in group), reverse=last_first)
    deck.deal(tiles, heads, batches, together, last_first, len(dealt), item)
    assert item[2] < 0
