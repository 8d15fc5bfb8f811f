"""How to train: the settings of a training run, and the learning rate at each step."""

import math
from dataclasses import dataclass, field
from typing import Any

PRECISIONS = ("fp32", "bf16")


@dataclass
class DiscriminatorConfig:
    """weight: gradient of the adversarial loss at the reconstruction, relative to that of all other losses; 0 turns
    the discriminator off.

    start_step: training steps without the discriminator at the start. channels: of the first convolution. layers: how
    many times the picture's sides are halved. lr: constant.
    """

    weight: float = 0.0
    start_step: int = 5000
    channels: int = 64
    layers: int = 3
    lr: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("channels", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.discriminator.{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("weight", "start_step", "lr"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"train.discriminator.{name} is {getattr(self, name)}; it must be finite, 0 or more")

    @property
    def smallest_side(self) -> int:
        """Side in pixels of the smallest picture that gets at least one logit."""
        return 3 * 2**self.layers


@dataclass
class Recipe:
    """How to train. batch_size: samples per worker and step. segment: size of the random crops for training, in pixels
    per side or in audio samples."""

    steps: int = 10_000
    batch_size: int = 32
    segment: int = 128
    lr: float = 1e-3
    lr_min: float = 0.0  # the learning rate at the end of the cosine
    warmup_steps: int = 100
    weight_decay: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    grad_clip: float = 1.0
    loss_weights: dict[str, float] = field(default_factory=dict)  # override the defaults of modality and quantizer
    losses: dict[str, Any] = field(default_factory=dict)  # settings of the modality's losses, e.g. perceptual
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    precision: str = "fp32"  # fp32, or bf16 for autocast; the quantizer always computes in fp32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "segment"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be 1 or more")
        if self.grad_clip <= 0:
            raise ValueError(
                f"train.grad_clip is {self.grad_clip}; it must be above 0 (a large number turns clipping off)"
            )
        if len(self.betas) != 2:
            raise ValueError(f"train.betas is {self.betas}; it must be two numbers")
        if self.precision not in PRECISIONS:
            raise ValueError(f"train.precision is {self.precision!r}; choose one of: {', '.join(PRECISIONS)}")


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up to lr, then half a cosine down to lr_min at the last step."""
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.lr_min + (recipe.lr - recipe.lr_min) * (1 + math.cos(math.pi * progress)) / 2
