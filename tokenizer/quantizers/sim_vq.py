"""SimVQ, arXiv 2411.02038: the codes are a learned linear map of frozen random vectors, so all codes move together.

Legend: z [N, d] latents, E0 [K, d] the frozen vectors, e = W E0 + b [K, d] the codes, q [N] indices.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenizer.clustering.neighbors import nearest_codeword
from tokenizer.errors import CodebookMissing
from tokenizer.quantizers.base.codebook import CodebookQuantizer, check_codebook_shape
from tokenizer.quantizers.base.quantizer import QUANTIZERS, QuantizerOutput, mean_squared
from tokenizer.quantizers.base.straight_through import GRADIENTS


@dataclass
class SimVQConfig:
    """gradient: straight_through (the official code) or rotation (lucidrains' implementation)."""

    codebook_size: int = 1024
    dim: int = 64
    gradient: str = "straight_through"

    def __post_init__(self) -> None:
        check_codebook_shape(self.codebook_size, self.dim)
        if self.gradient not in GRADIENTS:
            raise ValueError(f"quantizer.gradient is {self.gradient!r}; choose one of: {', '.join(GRADIENTS)}")


@QUANTIZERS.register("sim_vq")
class SimVQ(CodebookQuantizer):
    """VQ-VAE's losses on the projected codes: every latent gives W a gradient, and W moves every code.

    Differs: `decode` returns the projected code. The official get_codebook_entry returns E0[q] without W, which is not
    the code that the decoder was trained with.
    """

    frozen: Tensor
    initialised: Tensor
    Config = SimVQConfig
    default_loss_weights = {"codebook": 1.0, "commitment": 0.25}

    def __init__(self, config: SimVQConfig):
        super().__init__(config.codebook_size, config.dim)
        self.config = config
        self.register_buffer("frozen", torch.randn(config.codebook_size, config.dim) * config.dim**-0.5)
        self.projection = nn.Linear(config.dim, config.dim)
        self.register_buffer("initialised", torch.tensor(False))

    def _train_forward(self, z: Tensor) -> QuantizerOutput:
        self._thaw()
        if len(z):
            self.initialised.fill_(True)
        codes = self.projection(self.frozen)
        q = nearest_codeword(z, codes)
        e_q = codes[q]
        losses = {"codebook": mean_squared(z.detach() - e_q), "commitment": mean_squared(z - e_q.detach())}
        return QuantizerOutput(GRADIENTS[self.config.gradient](z, e_q), q, losses)

    def _live_codes(self) -> Tensor:
        if not self.initialised:
            raise CodebookMissing("this sim_vq was never trained: its codes are still random; train it first")
        return self.projection(self.frozen)
