"""One file per modality: bytes to arrays and back, losses and quality metrics."""
