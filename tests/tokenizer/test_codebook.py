"""Codebooks that `fit` freezes: afterwards only training changes them."""

import pytest
import torch
from torch import Tensor, nn

from tokenizer.errors import CodebookMissing
from tokenizer.quantizers.base.codebook import (
    INIT_TOKENS_PER_CODE,
    CodebookQuantizer,
    check_codebook_shape,
    first_codes,
)
from tokenizer.quantizers.base.quantizer import QuantizerOutput
from tokenizer.quantizers.vq_vae import VQVAEConfig


class Projected(CodebookQuantizer):
    """Computed codes: a learned factor times fixed numbers."""

    name = "projected"

    def __init__(self, codebook_size: int = 16, dim: int = 3):
        super().__init__(codebook_size, dim)
        self.factor = nn.Parameter(torch.ones(()))
        self.register_buffer("numbers", normals(codebook_size, dim))

    def _live_codes(self) -> Tensor:
        return self.factor * self.numbers

    def _train_forward(self, z: Tensor) -> QuantizerOutput:
        self._thaw()
        return QuantizerOutput(self._live_codes()[self._encode(z)])


class Empty(CodebookQuantizer):
    name = "empty"


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fitted() -> Projected:
    quantizer = Projected()
    quantizer.fit(normals(5, 3))
    return quantizer


# -- freezing -------------------------------------------------------------------------------------------------------


def test_before_fit_the_codes_follow_the_parameters():
    quantizer = Projected()
    quantizer.factor.data.fill_(2.0)
    assert torch.equal(quantizer.codebook, 2 * quantizer.numbers)


def test_after_fit_the_codes_are_frozen():
    quantizer = fitted()
    expected, indices = quantizer.codebook, quantizer.encode(normals(200, 3, seed=1))
    quantizer.factor.data.fill_(2.0)
    assert torch.equal(quantizer.codebook, expected)
    assert torch.equal(quantizer.encode(normals(200, 3, seed=1)), indices)


def test_a_second_fit_freezes_the_current_codes():
    quantizer = fitted()
    quantizer.factor.data.fill_(2.0)
    quantizer.fit(normals(5, 3))
    assert torch.equal(quantizer.codebook, 2 * quantizer.numbers)


def test_a_training_step_discards_the_frozen_codebook():
    quantizer = fitted()
    quantizer.factor.data.fill_(2.0)
    assert torch.equal(quantizer.eval()(normals(5, 3)).z_q, quantizer.table[quantizer.encode(normals(5, 3))])
    quantizer.train()(normals(5, 3))
    assert quantizer.table.shape == (0, 3)
    assert torch.equal(quantizer.codebook, 2 * quantizer.numbers)


def test_the_frozen_codebook_has_no_gradient_and_shares_no_memory_with_the_parameters():
    quantizer = fitted()
    assert not quantizer.table.requires_grad
    assert quantizer.table.data_ptr() != quantizer.numbers.data_ptr()


def test_without_codes_every_method_says_that_the_codebook_is_missing():
    quantizer = Empty(16, 3)
    for ask in (lambda: quantizer.encode(normals(5, 3)), lambda: quantizer.decode(torch.tensor([0])),
                lambda: quantizer.codebook, lambda: quantizer.fit(normals(5, 3)),
                lambda: quantizer.code_shares(normals(5, 3)), lambda: quantizer.eval()(normals(5, 3))):  # fmt: skip
        with pytest.raises(CodebookMissing, match="this empty has no codebook yet; run `tokenmill codebook"):
            ask()


# -- state ----------------------------------------------------------------------------------------------------------


def test_loading_a_codebook_of_another_size_sets_the_codebook_size():
    saved, loaded = Projected(codebook_size=16), Empty(8, 3)
    saved.fit(normals(5, 3))
    loaded.load_state_dict({"table": saved.state_dict()["table"]})
    assert loaded.codebook_size == 16
    assert torch.equal(loaded.codebook, saved.codebook)


def test_loading_a_state_without_a_codebook_unfreezes():
    quantizer = fitted()
    quantizer.load_state_dict(Projected().state_dict())
    assert len(quantizer.table) == 0
    assert quantizer.codebook_size == 16


def test_a_nested_state_loads():
    outer, other = nn.ModuleDict({"a": fitted()}), nn.ModuleDict({"a": Projected()})
    other.load_state_dict(outer.state_dict())
    assert torch.equal(other["a"].table, outer["a"].table)


# -- first codes ----------------------------------------------------------------------------------------------------


def test_first_codes_are_the_same_each_time_and_draw_no_global_random_number():
    before = torch.get_rng_state()
    first, again = first_codes(normals(500, 3), 16), first_codes(normals(500, 3), 16)
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)


def test_first_codes_use_only_the_first_latents_of_a_large_batch():
    z = normals(INIT_TOKENS_PER_CODE * 4, 3)
    assert torch.equal(first_codes(torch.cat([z, 100 + z]), 4), first_codes(z, 4))


def test_first_codes_have_no_gradient():
    assert not first_codes(normals(50, 3).requires_grad_(), 4).requires_grad


@pytest.mark.parametrize(("codebook_size", "dim"), [(0, 4), (4, 0), (-1, 4)])
def test_a_codebook_without_codes_or_dims_is_refused(codebook_size, dim):
    with pytest.raises(ValueError, match=f"codebook_size is {codebook_size} and dim {dim}; both must be above 0"):
        check_codebook_shape(codebook_size, dim)
    with pytest.raises(ValueError, match="both must be above 0"):
        VQVAEConfig(codebook_size=codebook_size, dim=dim)
