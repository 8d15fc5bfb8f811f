"""Codebook usage, solved by hand and against scipy."""

import numpy as np
import pytest
from scipy.stats import entropy

from tokenizer.metrics import perplexity, usage


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
        **{"num_tokens": 8, "codebook_size": 4, "target_size": 8},
        **{"perplexity": pytest.approx(2), "cvu": pytest.approx(0.5), "cvu_target": pytest.approx(0.25)},
        **{"utilisation": 0.5, "dead_codes": 2},
    }


def test_without_a_target_the_target_is_the_codebook():
    found = usage(np.array([1, 2, 3]))
    assert found["target_size"] == 3
    assert found["cvu"] == found["cvu_target"]


@pytest.mark.parametrize(("num_tokens", "expected"), [(16_384, 992), (1_024, 577)])
def test_few_uniform_tokens_read_as_the_docstring_says(num_tokens: int, expected: float):
    draws = [np.random.default_rng(seed).integers(1024, size=num_tokens) for seed in range(30)]
    mean = np.mean([perplexity(np.bincount(tokens, minlength=1024)) for tokens in draws])
    assert mean == pytest.approx(expected, rel=0.01)
