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


def test_samples_that_meet_in_the_rows_of_a_warpgroup_need_their_variant():
    tall, flat = gemm_sm90.Tile(2, 2, 192, 2, 1), gemm_sm90.Tile(2, 1, 256, 2, 1)
    assert [gemm_sm90._tail_level(flat, tail, 4096, (4096, 4096)) for tail in (False, True)] == [0, 1]
    assert [gemm_sm90._tail_level(tile, False, 4096, (4096, 1000)) for tile in (tall, flat)] == [2, 2]
    assert [gemm_sm90._tail_level(tile, True, 4032, (4032, 1344)) for tile in (tall, flat)] == [2, 1]


def test_few_tiles_are_split_until_they_fill_the_chip():
    """512 × 3072 is 64 tiles of 128 × 192, half a chip; 256 × 3072 is 24 of 256 × 128."""
    for m, split in ((512, 2), (256, 4)):
        tile = choose(m, 3072, 12288, PROCESSORS)
        rows, columns = tile.grid(m, 3072)
        assert tile.split == split
        assert 0.7 * PROCESSORS <= rows * columns * split <= PROCESSORS


@given(m=st.integers(1, 9000), n=st.integers(1, 900).map(lambda i: 16 * i), k=st.integers(1, 3))
def test_no_part_of_k_is_empty(m, n, k):
    assert choose(m, n, 64 * k, PROCESSORS).split <= k


def test_a_nearly_empty_last_wave_is_avoided():
    """4608 × 3072 is 2.2 waves of 256 × 192 and 2.9 of 192 × 192, which measures faster."""
    tile = choose(4608, 3072, 15360, PROCESSORS)
    assert (tile.m, tile.n) == (192, 192)
