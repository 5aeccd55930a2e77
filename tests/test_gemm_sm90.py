"""The choice of tiles for the Hopper GEMM: arithmetic that needs no GPU."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynx_compile.runtime import gemm_sm90
from lynx_compile.runtime.gemm_sm90 import RATES, choose
from lynx_compile.runtime.operands import Layer

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


@given(
    tile=tiles, m=st.integers(1, 9000), widths=st.lists(st.integers(1, 900).map(lambda i: 16 * i), max_size=4)
)
def test_layers_of_a_launch_have_columns_of_their_own(tile, m, widths):
    rows, columns = tile.grid(m, *widths)
    assert columns == sum(tile.grid(m, n)[1] for n in widths)
    assert all(tile.grid(m, n)[0] == rows for n in widths)


def layer(activation="none", gate=None, residual=None):
    return Layer(None, None, None, None, activation, gate, residual)


def test_layers_share_a_launch_unless_their_epilogues_differ():
    plain, gelu, gated, added = layer(), layer("gelu"), layer(gate=1), layer(residual=1)
    assert gemm_sm90.groups([plain] * 3) == [[0, 1, 2]]
    assert gemm_sm90.groups([plain] * 6) == [[0, 1, 2, 3], [4, 5]]
    assert gemm_sm90.groups([plain, gelu, plain, gated, gelu, added, plain]) == [[0, 2, 6], [1, 4], [3], [5]]


@pytest.mark.parametrize(
    ("m", "n", "k"), [(4096, 3072, 3072), (4608, (3072, 12288), 3072), (1, 16, 64), (20000, 9216, 64)]
)
def test_a_tail_never_gets_a_tile_it_slows_down(m, n, k):
    assert not gemm_sm90._slow_with_tail(choose(m, n, k, True, PROCESSORS))


def test_samples_that_meet_in_the_rows_of_a_warpgroup_count_as_a_tail():
    whole, split = ((choose(4096, 9216, 3072, False, PROCESSORS, (rows,))) for rows in (1024, 1000))
    assert gemm_sm90._slow_with_tail(whole)
    assert not gemm_sm90._slow_with_tail(split)


def test_few_rows_spread_over_many_multiprocessors():
    """One row of tiles: the narrowest, as no other occupies as much of the chip."""
    narrowest = min(RATES, key=lambda tile: tile.m * tile.n)
    assert choose(64, 3072, 3072, False, PROCESSORS) == narrowest


def test_a_nearly_empty_last_wave_is_avoided():
    """4608 × 3072 is 2.2 waves of 256 × 192 and 2.9 of 192 × 192, which measures faster."""
    tile = choose(4608, 3072, 15360, False, PROCESSORS)
    assert (tile.m, tile.n) == (192, 192)
