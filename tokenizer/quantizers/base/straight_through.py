"""Gradients through quantization, which has none of its own: straight-through, or rotated like the latent."""

import torch
from torch import Tensor, nn

MIN_BISECTOR, MIN_LENGTH = 1e-3, 1e-4  # relative; below them rounding errors would determine the rotation


def straight_through(z: Tensor, z_q: Tensor) -> Tensor:
    """z_q in the forward pass; in the backward pass z gets the gradient unchanged."""
    return z_q.detach() + (z - z.detach())  # in this order z - z is 0, so the result equals z_q to the bit


def rotate_to(z: Tensor, e: Tensor) -> Tensor:
    """e in the forward pass; in the backward pass z gets the gradient rotated and scaled by the map from z to e.

    z, e [N, D] -> [N, D]. R = I - 2 r r^T + 2 e' z'^T with r the unit bisector (arXiv 2410.06424, section 4.2).
    Differs: straight-through if z points away from e, where no rotation is determined, or if z is shorter than 1e-4 of
    e, which would scale the gradient by 1e4.
    """
    length_z, length_e = z.detach().norm(dim=1, keepdim=True), e.detach().norm(dim=1, keepdim=True)
    safe_z, safe_e = length_z.clamp(min=1e-12), length_e.clamp(min=1e-12)
    unit_z, unit_e = z.detach() / safe_z, e.detach() / safe_e
    middle = unit_z + unit_e
    determined = (middle.norm(dim=1, keepdim=True) > MIN_BISECTOR) & (length_z > MIN_LENGTH * length_e)
    bisector = nn.functional.normalize(middle, dim=1)
    reflected = z - 2 * (z * bisector).sum(dim=1, keepdim=True) * bisector
    rotated = reflected + 2 * (z * unit_z).sum(dim=1, keepdim=True) * unit_e
    # straight_through makes the forward value e to the bit; close to an undetermined rotation the product is off by
    # .001
    return straight_through(torch.where(determined, rotated * (length_e / safe_z), z), e)


GRADIENTS = {"straight_through": straight_through, "rotation": rotate_to}
