"""Pictures: reading, losses, metrics."""

from tokenizer.modalities.image.modality import Image

__all__ = ["Image"]
