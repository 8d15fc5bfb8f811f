"""FSQ: finite scalar quantization, arXiv 2309.15505; symmetric edges from Parker et al., arXiv 2411.19842."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenizer.quantizers.base.levels import MixedRadix, check_levels, levels_for
from tokenizer.quantizers.base.quantizer import QUANTIZERS, Quantizer, QuantizerOutput
from tokenizer.quantizers.base.straight_through import straight_through

EPSILON = 1e-3  # how far the bounded value can exceed the outermost level, as in the paper's listing
EDGES = ("original", "symmetric")


@dataclass
class FSQConfig:
    """levels: [] derives them from codebook_size. noise_rate: share of scalars that get uniform noise instead of
    rounding.

    The baseline of arXiv 2602.17133 has symmetric edges and noise_rate 0.5.
    """

    codebook_size: int = 1024
    levels: list[int] = field(default_factory=list)
    edges: str = "symmetric"
    noise_rate: float = 0.0

    def __post_init__(self) -> None:
        check_levels(self.levels)
        if self.edges not in EDGES:
            raise ValueError(f"quantizer.edges is {self.edges!r}; choose one of: {', '.join(EDGES)}")
        if not 0 <= self.noise_rate <= 1:
            raise ValueError(f"quantizer.noise_rate is {self.noise_rate}; it must lie in 0..1")


@QUANTIZERS.register("fsq")
class FSQ(Quantizer):
    """Bounds each scalar with tanh and rounds it to one of L levels. No loss, no state."""

    levels: Tensor
    top: Tensor
    reach: Tensor
    offset: Tensor
    shift: Tensor
    middle: Tensor
    slope: Tensor
    Config = FSQConfig

    def __init__(self, config: FSQConfig):
        super().__init__()
        self.config = config
        levels = list(config.levels) or levels_for(config.codebook_size)
        self.radix = MixedRadix(levels)
        self.dim = self.in_dim = len(levels)
        self.codebook_size = math.prod(levels)
        self.index_levels = tuple(levels)
        self.symmetric, self.noise_rate = config.edges == "symmetric", config.noise_rate
        sizes = torch.tensor(levels, dtype=torch.float32)
        half = (sizes - 1) * (1 + EPSILON) / 2
        offset = torch.where(sizes % 2 == 0, 0.5, 0.0)
        constants = {"levels": sizes, "top": sizes - 1, "reach": half, "offset": offset}
        constants |= {"shift": torch.atanh(offset / half), "middle": sizes // 2, "slope": half / (sizes // 2)}
        for name, value in constants.items():  # buffers, so that they move to the device of the latents
            self.register_buffer(name, value, persistent=False)

    @property
    def target_size(self) -> int:
        return self.codebook_size if self.config.levels else self.config.codebook_size

    def _train_forward(self, z: Tensor) -> QuantizerOutput:
        bounded = self._bound(z)
        with torch.no_grad():  # rounding has no gradient; the one of `_smooth` is used instead
            position = self._position(bounded)
            nearest = self._nearest(position)
            indices = self.radix.pack(nearest.long()) if self.noise_rate == 0 else None
            if self.noise_rate > 0:
                # the noise is 1/L of the whole range wide, as in L3AC's SuperFSQ
                noisy = position + (torch.rand_like(position) - 0.5) * self.top / self.levels
                nearest = torch.where(torch.rand_like(position) < self.noise_rate, noisy, nearest)
            value = self._value(nearest)
        return QuantizerOutput(straight_through(self._smooth(bounded), value), indices)

    def _encode(self, z: Tensor) -> Tensor:
        return self.radix.pack(self._nearest(self._position(self._bound(z))).long())

    def _decode(self, indices: Tensor) -> Tensor:
        return self._value(self.radix.unpack(indices).float())

    def _bound(self, z: Tensor) -> Tensor:
        return torch.tanh(z if self.symmetric else z + self.shift)

    def _position(self, bounded: Tensor) -> Tensor:
        """The position of z on a scale with the levels at the integers 0..L-1."""
        if self.symmetric:
            return self.top * (bounded + 1) / 2
        return bounded * self.reach - self.offset + self.middle

    def _smooth(self, bounded: Tensor) -> Tensor:
        """`_value` of `_position` up to a constant, without rounding. The gradient goes through this."""
        return bounded if self.symmetric else bounded * self.slope

    def _nearest(self, position: Tensor) -> Tensor:
        # nan_to_num: the result of casting NaN to int64 depends on the processor
        nearest = torch.floor(position + 0.5).nan_to_num(0.0)
        return torch.minimum(nearest.clamp(min=0), self.top)

    def _value(self, position: Tensor) -> Tensor:
        """Positions in 0..L-1 -> the decoder's input in [-1, 1]."""
        if self.symmetric:
            return 2 * position / self.top - 1
        return position / self.middle - 1
