"""Codebook usage, compared to results by hand and to scipy."""

import numpy as np
import pytest
from scipy.stats import entropy

from tokenizer.usage import count_codes, digit_usage, perplexity, usage


@pytest.mark.parametrize("codebook_size", [1, 2, 1000])
def test_codes_used_alike_have_a_perplexity_of_their_number(codebook_size: int):
    assert perplexity(np.full(codebook_size, 7)) == pytest.approx(codebook_size)


def test_one_code_has_a_perplexity_of_1():
    assert perplexity(np.array([0, 9, 0])) == 1


def test_nothing_counted_has_a_perplexity_of_0():
    assert perplexity(np.zeros(5, dtype=np.int64)) == 0


def test_perplexity_is_exp_of_scipys_entropy():
    counts = np.random.default_rng(0).integers(0, 50, 300)
    assert perplexity(counts) == pytest.approx(np.exp(entropy(counts)))


def test_dead_codes_do_not_change_the_perplexity():
    assert perplexity(np.array([3, 1])) == pytest.approx(perplexity(np.array([3, 0, 0, 1, 0])))


def test_usage_solved_by_hand():
    found = usage(np.array([4, 4, 0, 0]), target_size=8)
    assert found == {
        **{"num_tokens": 8, "codebook_size": 4, "num_quantizers": 1, "target_size": 8},
        **{"perplexity": pytest.approx(2), "cvu": pytest.approx(0.5), "cvu_target": pytest.approx(0.25)},
        **{"utilisation": 0.5, "dead_codes": 2},
    }


def test_usage_of_several_quantizers_is_the_mean_of_each():
    found = usage(np.array([[4, 4, 0, 0], [2, 2, 2, 2]]))
    assert (found["num_quantizers"], found["num_tokens"]) == (2, 16)
    assert found["perplexity"] == pytest.approx((2 + 4) / 2)
    assert found["utilisation"] == 0.75


def test_usage_per_digit_solved_by_hand():
    """Indices of two digits with 2 and 3 values. The first digit is always 0, the second is 0 or 2."""
    counts = np.zeros(6, dtype=np.int64)
    counts[[0 + 2 * 0, 0 + 2 * 2]] = 5
    assert digit_usage(counts, (2, 3)) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_an_unclipped_normal_grid_reads_as_full_per_digit_and_not_jointly():
    """TokenBridge's .9887 (cautions in docs/methods.md): bins of .2125, .2875, .2875, .2125 in each of 4 dims."""
    share = np.array([0.2125, 0.2875, 0.2875, 0.2125])
    joint = np.einsum("a,b,c,d->abcd", *[share] * 4).ravel()
    assert digit_usage(joint, (4, 4, 4, 4)) == pytest.approx(0.98875, abs=1e-4)
    assert perplexity(joint) / 256 == pytest.approx(0.956, abs=1e-3)


def test_codes_are_counted_for_each_quantizer():
    tokens = np.array([[[0, 1], [1, 3]], [[2, 2], [2, 0]]])
    assert count_codes(tokens, 4).tolist() == [[1, 2, 0, 1], [1, 0, 3, 0]]


def test_without_a_target_the_target_is_the_codebook():
    found = usage(np.array([1, 2, 3]))
    assert found["target_size"] == 3
    assert found["cvu"] == found["cvu_target"]


@pytest.mark.parametrize(("num_tokens", "expected"), [(16_384, 992), (1_024, 577)])
def test_few_uniform_tokens_read_as_the_docstring_says(num_tokens: int, expected: float):
    draws = [np.random.default_rng(seed).integers(1024, size=num_tokens) for seed in range(30)]
    mean = np.mean([perplexity(np.bincount(tokens, minlength=1024)) for tokens in draws])
    assert mean == pytest.approx(expected, rel=0.01)
