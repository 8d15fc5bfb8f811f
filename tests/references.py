"""Independent computations that several tests compare with."""

import numpy as np


def low_rank_distance(x: np.ndarray, y: np.ndarray) -> float:
    """The Frechet distance of the Gaussians of two samples [n, D] each, for n below D.

    The trace of the root of C1 C2 is the sum of the singular values of X Y^T / (n - 1) of the centred samples, n x n.
    """
    cx, cy = x - x.mean(axis=0), y - y.mean(axis=0)
    squares = (cx**2).sum() + (cy**2).sum() - 2 * np.linalg.norm(cx @ cy.T, ord="nuc")
    return ((x.mean(axis=0) - y.mean(axis=0)) ** 2).sum() + squares / (len(x) - 1)
