"""Audio: reading, losses, metrics."""

from tokenizer.modalities.audio.modality import Audio

__all__ = ["Audio"]
