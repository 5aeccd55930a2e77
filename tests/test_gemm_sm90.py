"""The choice of tiles for the Hopper GEMM: arithmetic that needs no GPU."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynx_compile.runtime import gemm_sm90
from lynx_compile.runtime.gemm_sm90 import RATES, choose

PROCESSORS = 132
tiles = st.sampled_from(list(RATES))


@given(tile=tiles, m=st.integers(1, 20000), n=st.integers(1, 2000).map(lambda i: 16 * i))
def test_a_grid_covers_the_output_and_no_more(tile, m, n):
    rows, columns = tile.grid(m, n)
    height, width = tile.m * tile.cluster_m, tile.n * tile.cluster_n
    assert (rows - 1) * height < m <= rows * height
    assert (columns - 1) * width < n <= columns * width


@pytest.mark.parametrize("tile", RATES, ids=str)
def test_a_ring_fills_shared_memory(tile):
    assert tile.smem <= gemm_sm90.SMEM_LIMIT
    assert tile.stages == gemm_sm90.MAX_STAGES or tile.smem + tile.slot > gemm_sm90.SMEM_LIMIT - 1024
    assert tile.stages >= 4


@pytest.mark.parametrize(
    ("m", "n", "k"), [(4096, 3072, 3072), (4608, 21504, 3072), (1, 16, 64), (20000, 9216, 64)]
)
def test_a_tail_never_gets_a_tile_without_registers_for_it(m, n, k):
    assert not gemm_sm90._light(choose(m, n, k, True, PROCESSORS))


def test_few_rows_spread_over_many_multiprocessors():
    """One row of tiles: the narrowest, as no other occupies as much of the chip."""
    narrowest = min(RATES, key=lambda tile: tile.m * tile.n)
    assert choose(64, 3072, 3072, False, PROCESSORS) == narrowest


def test_a_nearly_empty_last_wave_is_avoided():
    """4608 × 3072 is 2.2 waves of 256 × 192 and 2.9 of 192 × 192, which measures faster."""
    tile = choose(4608, 3072, 15360, False, PROCESSORS)
    assert (tile.m, tile.n) == (192, 192)
