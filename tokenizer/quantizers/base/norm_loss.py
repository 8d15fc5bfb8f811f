"""L_norm of arXiv 2602.17133, eq. 10: latents are held at mean 0 and a set variance, per dimension."""

from torch import Tensor

from tokenizer.distributed import mean_across_ranks


def moment_losses(z: Tensor, variance: float | None) -> dict[str, Tensor]:
    """Mean over dims of mu^2 ("norm_mean") and of (sigma^2 - variance)^2 ("norm_var"), over all ranks' rows.

    z [N, D]; variance None holds the mean alone. Differs: the biased variance, so that one row is finite; the
    official code divides by N - 1.
    """
    if len(z) == 0:
        return {"norm_mean": z.sum(), "norm_var": z.sum()}
    mean = mean_across_ranks(z.mean(dim=0))
    # about the mean, not E z^2 - (E z)^2, which has no digits left where latents lie far from 0
    spread = mean_across_ranks((z - mean.detach()).square().mean(dim=0))
    off = (spread - variance).square().mean() if variance is not None else z.new_zeros(())
    return {"norm_mean": mean.square().mean(), "norm_var": off}
