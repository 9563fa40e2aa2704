"""The order of the one-pass backward (csrc/power/attention_deck.h), compiled for the host and looked at from end to end."""

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
extern "C" void deal(int blocks, int heads, int batches, int together, int late, int index, int *item) {{
  const BackwardDeal deal(blocks, heads, batches, together, late, nullptr);
  const Item x = deal.item(index);
  item[0] = x.head, item[1] = x.batch, item[2] = x.tile;
}}
/* tiles and turns of an item's visits; returns how many there are */
extern "C" int visits(int blocks, int heads, int batches, int together, int late, int row_tiles, int index, int *tiles,
                      int *turns) {{
  const BackwardDeal deal(blocks, heads, batches, together, late, nullptr);
  const Item x = deal.item(index);
  for (int step = 0; step < deal.visits(x, row_tiles); ++step)
    tiles[step] = deal.visit(x, step, row_tiles), turns[step] = deal.turn(x, tiles[step]);
  return deal.visits(x, row_tiles);
}}
"""


@pytest.fixture(scope="module")
def deck(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("deck")
    (folder / "deck.cpp").write_text(SOURCE)
    assert COMPILER is not None
    subprocess.run([COMPILER, "-std=c++17", "-shared", "-fPIC", "deck.cpp", "-o", "deck.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "deck.so"))


@pytest.mark.parametrize(("row_tiles", "heads", "batches", "together", "late"), [
    (64, 3, 2, 2, 2), (63, 2, 1, 2, 2), (65, 1, 1, 2, 1), (8, 5, 3, 2, 2), (8, 5, 3, 4, 8), (7, 4, 1, 1, 0), (1, 1, 2, 2, 2),
])  # fmt: skip
def test_sums_have_one_order_and_no_cycle(
    deck: ctypes.CDLL, row_tiles: int, heads: int, batches: int, together: int, late: int
) -> None:
    blocks = (row_tiles + 1) // 2
    shape = (blocks, heads, batches, together, late)
    item, tiles, turns = (ctypes.c_int * 3)(), (ctypes.c_int * row_tiles)(), (ctypes.c_int * row_tiles)()
    dealt: dict[tuple[int, int, int], int] = {}
    adders: dict[tuple[int, int, int], dict[int, int]] = {}  # tile → turn → index of the item that takes it
    for index in range(blocks * heads * batches):
        deck.deal(*shape, index, item)
        head, batch, block = item
        assert 0 <= head < heads and 0 <= batch < batches and 0 <= block < blocks
        dealt[head, batch, block] = index
        count = deck.visits(*shape, row_tiles, index, tiles, turns)
        assert sorted(tiles[:count]) == list(range(2 * block, row_tiles))  # every query that sees the block, once
        for tile, turn in zip(tiles[:count], turns[:count], strict=True):
            takers = adders.setdefault((head, batch, tile), {})
            assert turn not in takers
            takers[turn] = index
    assert len(dealt) == blocks * heads * batches  # every block of keys, once
    deck.deal(*shape, len(dealt), item)
    assert item[2] < 0
    for (_, _, tile), takers in adders.items():
        order = [takers[turn] for turn in range(tile // 2 + 1)]  # turns 0 … last, none missing
        assert order == sorted(order)  # whoever is waited for was dealt before


def test_a_launch_ends_with_short_items(deck: ctypes.CDLL) -> None:
    blocks, row_tiles = 32, 64
    tiles, turns = (ctypes.c_int * row_tiles)(), (ctypes.c_int * row_tiles)()
    lengths = [deck.visits(blocks, 4, 2, 2, 2, row_tiles, index, tiles, turns) for index in range(8 * blocks)]
    assert lengths[-2 * blocks :] == sorted(lengths[-2 * blocks :], reverse=True)
    assert lengths[-1] == 2
