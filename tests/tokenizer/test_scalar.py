"""Mixed radix, and the choice of levels for FSQ and FSP."""

import math

import numpy as np
import pytest
import torch

from tokenizer.quantizers.base.levels import MAX_LEVELS, MIN_LEVELS, PAPER_LEVELS, MixedRadix, levels_for


def test_first_dimension_is_the_least_significant():
    radix = MixedRadix([8, 6, 5])
    assert radix.pack(torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [7, 5, 4]])).tolist() == [1, 8, 48, 239]


@pytest.mark.parametrize("levels", [[8, 6, 5], [3, 16, 4], [8, 5, 5, 5], [12]])
def test_pack_and_unpack_agree_with_numpy(levels):
    digits = np.stack(np.unravel_index(np.arange(math.prod(levels)), levels, order="F"), axis=1)
    radix = MixedRadix(levels)
    assert torch.equal(radix.pack(torch.from_numpy(digits)), torch.arange(len(digits)))
    assert torch.equal(radix.unpack(torch.arange(len(digits))), torch.from_numpy(digits))


@pytest.mark.parametrize("levels", [[8] * 9, [16] * 8, [16] * 15, [7, 11] * 8])
def test_indices_beyond_float32_and_int32_are_exact(levels):
    """Compared to Python's unbounded integers."""
    digits = [[level - 1 - (i * j) % level for j, level in enumerate(levels)] for i in range(50)]
    expected = [sum(digit * math.prod(levels[:i]) for i, digit in enumerate(row)) for row in digits]
    indices = MixedRadix(levels).pack(torch.tensor(digits))
    assert indices.tolist() == expected
    assert max(expected) > 2**24
    assert MixedRadix(levels).unpack(indices).tolist() == digits


def test_levels_of_the_papers():
    products = [math.prod(levels_for(size)) for size in (256, 1024, 4096, 16384)]
    assert products == [240, 1000, 4375, 15360]
    assert [len(levels_for(size)) for size in (256, 1024, 4096, 16384)] == [3, 4, 5, 5]


def test_up_to_16_codes_are_one_dimension():
    assert [levels_for(size) for size in range(3, 17)] == [[size] for size in range(3, 17)]


@pytest.mark.parametrize(
    ("lowest", "highest", "off"),
    [(3, 59, 0.06), (60, 260, 0.033), (261, 500, 0.027), (501, 1000, 0.02), (1001, 2000, 0.014)],
)
def test_levels_come_near_to_any_size(lowest, highest, off):
    """The worst cases except the papers' sizes: 17 -> 16 (5.9 %), 93 -> 90, 263 -> 256, 918 -> 900, 1242 -> 1225."""
    sizes = [size for size in range(lowest, highest + 1) if size not in PAPER_LEVELS]
    assert max(abs(math.prod(levels_for(size)) - size) / size for size in sizes) <= off


@pytest.mark.parametrize("size", [2**15, 2**16, 10**6, 2**20, 12345, 99991])
def test_levels_come_within_a_thousandth_of_large_sizes(size):
    assert math.prod(levels_for(size)) == pytest.approx(size, rel=1e-3)


def test_levels_are_within_their_limits_and_in_descending_order():
    for size in range(3, 2001):
        levels = levels_for(size)
        assert levels == sorted(levels, reverse=True)
        assert all(MIN_LEVELS <= level <= MAX_LEVELS for level in levels)


@pytest.mark.parametrize(
    ("size", "levels"),
    [(17, [4, 4]), (512, [8, 8, 8]), (1000, [10, 10, 10]), (625, [5, 5, 5, 5]), (65536, [16, 16, 16, 16])],
)
def test_of_equally_near_levels_the_fewest_dimensions_and_the_most_even_are_taken(size, levels):
    """For 17, 16 = 4 * 4 and 18 = 6 * 3 are equally close. 65536 is both 16^4 and 4^8."""
    assert levels_for(size) == levels


def test_too_few_codes_are_refused():
    with pytest.raises(ValueError, match="codebook_size is 2; a scalar quantizer needs 3 or more"):
        levels_for(2)
