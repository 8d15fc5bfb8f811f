"""One package per modality: bytes to arrays and back, losses and quality metrics."""
