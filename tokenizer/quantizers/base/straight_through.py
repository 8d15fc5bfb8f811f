"""How a gradient passes a step that has none: straight through it, or rotated as the latent was."""

import torch
from torch import Tensor, nn

MIN_BISECTOR, MIN_LENGTH = 1e-3, 1e-4  # relative: below, rounding would decide on the rotation


def straight_through(z: Tensor, z_q: Tensor) -> Tensor:
    """z_q forward, the gradient of z backward, unchanged."""
    return z_q.detach() + (z - z.detach())  # in this order: z - z is 0, so that z_q comes out bit by bit


def rotate_to(z: Tensor, e: Tensor) -> Tensor:
    """e forward; backward the gradient is rotated and scaled as z was to become e.

    z, e [N, D] -> [N, D]. R = I - 2 r r^T + 2 e' z'^T with r the unit bisector (arXiv 2410.06424, section 4.2).
    Differs: straight-through where z points away from e, or is less than 1e-4 as long as e (which would scale the
    gradient by 1e4), as no rotation is determined there.
    """
    length_z, length_e = z.detach().norm(dim=1, keepdim=True), e.detach().norm(dim=1, keepdim=True)
    safe_z, safe_e = length_z.clamp(min=1e-12), length_e.clamp(min=1e-12)
    unit_z, unit_e = z.detach() / safe_z, e.detach() / safe_e
    middle = unit_z + unit_e
    determined = (middle.norm(dim=1, keepdim=True) > MIN_BISECTOR) & (length_z > MIN_LENGTH * length_e)
    bisector = nn.functional.normalize(middle, dim=1)
    reflected = z - 2 * (z * bisector).sum(dim=1, keepdim=True) * bisector
    rotated = reflected + 2 * (z * unit_z).sum(dim=1, keepdim=True) * unit_e
    # straight_through: near an undetermined rotation the product is off by .001, and e should come out bit by bit
    return straight_through(torch.where(determined, rotated * (length_e / safe_z), z), e)


GRADIENTS = {"straight_through": straight_through, "rotation": rotate_to}
