"""Latent norm losses: L_norm of arXiv 2602.17133, eq. 10, which pulls latents to mean 0 and a given variance."""

from torch import Tensor

from tokenizer.distributed import mean_across_ranks


def latent_norm_losses(z: Tensor, variance: float | None) -> dict[str, Tensor]:
    """Means over dims of mu^2 ("norm_mean") and of (sigma^2 - variance)^2 ("norm_var"); moments are over all ranks.

    z [N, D]. Without a variance, "norm_var" is 0. Differs: we use the biased variance, which is finite for one row; the
    official code divides by N - 1.
    """
    if len(z) == 0:
        return {"norm_mean": z.sum(), "norm_var": z.sum()}
    mean = mean_across_ranks(z.mean(dim=0))
    # not E z^2 - (E z)^2, which loses all precision for latents far from 0
    spread = mean_across_ranks((z - mean.detach()).square().mean(dim=0))
    off = (spread - variance).square().mean() if variance is not None else z.new_zeros(())
    return {"norm_mean": mean.square().mean(), "norm_var": off}
