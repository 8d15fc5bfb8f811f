"""VP-VAE: vector perturbation, arXiv 2602.17133, section 3.2. Trains without a codebook, which k-means makes
afterwards.

Legend: z [N, d] latents, S the queue of recent latents, K codebook_size, M = |S| / K,
D_m(z) the distance from z to its m-th nearest neighbour in S.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenizer.clustering.kmeans import kmeans
from tokenizer.clustering.latents import LatentBatch, Latents
from tokenizer.clustering.neighbors import BACKENDS, TREE_MAX_DIM, NeighborIndex, build_index, nearest_codeword
from tokenizer.distributed import gather_rows, mean_across_ranks, world_size
from tokenizer.quantizers.base.codebook import CodebookQuantizer, check_codebook_shape
from tokenizer.quantizers.base.latent_queue import LatentQueue
from tokenizer.quantizers.base.norm_loss import latent_norm_losses
from tokenizer.quantizers.base.quantizer import QUANTIZERS, QuantizerOutput
from tokenizer.quantizers.base.straight_through import straight_through

FLUSH_SHARE = 0.005  # of the queue may wait: replacing .5 % of the latents does not change radii measurably
RATIO_QUERIES = 4096  # latents on which perturbation_ratio is measured
MAX_SEARCHED = 2**18  # points for a nearest-neighbour search without a tree
ETA_STEPS = 60  # until an automatic eta has converged
ETA_RANGE = (0.25, 4.0)
MIN_PER_CODE = 16  # latents per code in the queue before its radii are used: their error is then 6 % at d = 4
RENEWAL_SHARE = 0.1  # the queue holds the latents of the last tenth of the steps so far
MIN_RENEWAL_STEPS = 50  # a queue that is renewed faster would hold little more than the last batches
MIN_UPDATE_PROBABILITY = 0.01  # the official rate, which long runs reach
UNKNOWN_STEPS = 2**40  # for a checkpoint without a step count: treated as a long run
ETA_GAIN = 0.05  # of the log ratio per step: converges in about 50 steps and averages over about 20


@dataclass
class VPVAEConfig:
    """eta: radius of the perturbation in units of D_M, or "auto", which matches the mean energy of the perturbation
    over all tokens to the expected error of quantization with K codes: about twice the energy of the default, 1.

    update_probability: share of a batch's latents that enter the queue once it is full, or "auto", which renews the
    queue within a tenth of the steps so far. That is fast early in training, while latents still move, and in a long
    run falls to 0.01, the official rate.

    balance: 0 gives the codebook with the least squared error, 1 a codebook with about equally used codes.
    Defaults are from results/e3: auto was never better than 1, and 0.5 raises CVU from .86 to .96 for .03 dB.
    """

    codebook_size: int = 1024
    dim: int = 4
    eta: int | float | str = 1.0
    mh_steps: int = 1  # Metropolis-Hastings steps per token
    density_k: int = 8  # neighbour for the density estimate; `k4nn` in the official code
    latents_per_code: int = 0  # M; 0 means 16 per dimension, as in the official code
    update_probability: int | float | str = "auto"
    balance: float = 0.5
    backend: str = "auto"  # of the neighbour search: auto, kdtree, gemm, subsample

    def __post_init__(self) -> None:
        self.eta = self._number_or_auto("eta")
        self.update_probability = self._number_or_auto("update_probability")
        check_codebook_shape(self.codebook_size, self.dim)
        if self.mh_steps < 1:
            raise ValueError(f"quantizer.mh_steps is {self.mh_steps}; it must be 1 or more")
        if not 0 <= self.balance <= 1:
            raise ValueError(f"quantizer.balance is {self.balance}; it must lie in 0..1")
        if self.update_probability != "auto" and float(self.update_probability) > 1:
            raise ValueError(
                f"quantizer.update_probability is {self.update_probability}; it must be at most 1, or auto"
            )
        if self.backend != "auto" and self.backend not in BACKENDS:
            raise ValueError(f"quantizer.backend is {self.backend!r}; choose one of: auto, {', '.join(BACKENDS)}")
        self.latents_per_code = self.latents_per_code or 16 * self.dim
        if self.density_k > self.codebook_size * self.latents_per_code:
            raise ValueError(
                f"quantizer.density_k is {self.density_k}; it must be at most the size of the queue, "
                f"codebook_size * latents_per_code = {self.codebook_size * self.latents_per_code}"
            )

    def _number_or_auto(self, name: str) -> float | str:
        value = getattr(self, name)
        if value == "auto":
            return "auto"
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if not 0 < number < math.inf:
            raise ValueError(f"quantizer.{name} is {value!r}; it must be a number above 0, or auto")
        return number


@QUANTIZERS.register("vp_vae")
class VPVAE(CodebookQuantizer):
    """Training perturbs each latent about as much as quantization would; `fit` makes the codebook after training.

    Differs: our queue starts empty and takes all latents of the first batches. Perturbation starts when it holds 16
    latents per code, with M in proportion to its fill. The official queue starts as N(0, I) noise, and 1 % of each
    batch replaces it, so for the first 800 steps (K = 1024) to 16,000 steps (K = 16,384) radii are not those of the
    latents. Once full, our queue is renewed at the rate `update_probability`; the official code uses 0.01 from the
    first step.
    """

    log_eta: Tensor
    steps: Tensor
    Config = VPVAEConfig
    default_loss_weights = {"norm_mean": 0.1, "norm_var": 0.07}
    training_state = ("queue.", "log_eta", "steps")
    fit_settings = ("balance",)
    fits_any_size = True

    def __init__(self, config: VPVAEConfig):
        super().__init__(config.codebook_size, config.dim)
        self.config = config
        self.radius_k = config.latents_per_code
        capacity = config.codebook_size * config.latents_per_code
        self.queue = LatentQueue(capacity, config.dim, flush=round(FLUSH_SHARE * capacity))
        eta = 1.0 if config.eta == "auto" else float(config.eta)
        self.register_buffer("log_eta", torch.tensor(math.log(eta)))
        self.register_buffer("steps", torch.tensor(0))
        self._index: NeighborIndex | None = None  # over queue.samples; built again when they change, never saved
        self._num_indexed = 0

    # -- training: no codebook ------------------------------------------------------------------------------------

    def _train_forward(self, z: Tensor) -> QuantizerOutput:
        losses = latent_norm_losses(z, variance=1.0)
        self.steps.add_(1)
        if self._num_searched() == 0 or len(z) == 0:  # no density estimate yet: trains as a plain autoencoder
            self._remember(z)
            return QuantizerOutput(z, losses=losses, metrics={"queue_filled": self.queue.filled_share})
        moved, metrics = self._perturb(z.detach())
        if not self.queue.full:
            metrics["queue_filled"] = self.queue.filled_share
        self._remember(z)  # after the perturbation, so that no latent is its own neighbour
        return QuantizerOutput(straight_through(z, moved), losses=losses, metrics=metrics)

    @torch.no_grad()
    def _perturb(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`mh_steps` Metropolis-Hastings steps, whose stationary distribution is that of the latents in the queue."""
        eta = self.log_eta.exp()
        here, distances = z, self._distances(z)
        target = quantization_error(distances[:, 1], self.dim)
        accepted = torch.zeros(len(z), dtype=torch.bool, device=z.device)
        for _ in range(self.config.mh_steps):
            here, distances, took = self._mh_step(here, distances, eta)
            accepted |= took
        energy = (here - z).square().sum(dim=1).mean()
        energy, target, share = mean_across_ranks(torch.stack([energy, target, accepted.float().mean()]))
        ratio = torch.where(target > 0, energy / target, 1.0)  # equal latents have no error and need no noise
        if self.config.eta == "auto":
            self._adapt_eta(ratio)
        return here, {"accepted": share, "energy_ratio": ratio, "eta": eta}

    def _mh_step(self, z: Tensor, distances: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step: a proposal uniform in the ball of radius eta * D_M(z), accepted by density and reverse proposal."""
        direction = torch.nn.functional.normalize(torch.randn_like(z), dim=1)
        radius = eta * distances[:, 1] * torch.rand_like(z[:, 0]) ** (1 / self.dim)
        proposal = z + radius[:, None] * direction
        there = self._distances(proposal)
        # log alpha = d [ln D_k(z) + ln D_M(z) - ln D_k(z') - ln D_M(z')]; duplicates have D_k(z) = 0 and do not move
        log_alpha = self.dim * (distances.log().sum(dim=1) - there.log().sum(dim=1))
        reversible = (proposal - z).norm(dim=1) < eta * there[:, 1]
        accept = reversible & (torch.rand_like(radius).log() < log_alpha)
        return torch.where(accept[:, None], proposal, z), torch.where(accept[:, None], there, distances), accept

    def _distances(self, z: Tensor) -> Tensor:
        """D_k and D_M of each z: [N, d] -> [N, 2]."""
        count = self._num_searched()
        if self._index is None or self._num_indexed != count:
            self._index = build_index(self.queue.samples[:count], self.config.backend)
            self._num_indexed = count
        return self._index.kth_distances(z, [self.config.density_k, count // self.config.codebook_size])

    def _num_searched(self) -> int:
        """How many of the queue's latents are searched: all if it is full, 0 while it holds too few.

        In between the number grows in steps of a quarter, so that the index is not built again in every step.
        """
        if self.queue.full:
            return self.queue.capacity
        count, filled = min(self.radius_k, MIN_PER_CODE) * self.config.codebook_size, int(self.queue.filled)
        if filled < count:
            return 0
        while count + count // 4 <= filled:
            count += count // 4
        return count

    def _adapt_eta(self, ratio: Tensor) -> None:
        """The energy grows roughly with eta, not eta^2, because longer moves are accepted less often."""
        step = ETA_GAIN * ratio.clamp(0.1, 10).log()
        self.log_eta.sub_(step).clamp_(math.log(ETA_RANGE[0]), math.log(ETA_RANGE[1]))

    def _remember(self, z: Tensor) -> None:
        """Adds a random share of all ranks' latents to the queue, or all of them while it fills.

        Equal on every rank.
        """
        was_full = self.queue.full
        if was_full:
            z = z[torch.randperm(len(z), device=z.device)[: self._num_entering(len(z), world_size())]]
        if self.queue.add(gather_rows(z)) and was_full:  # while it fills, the searched latents stay the same
            self._index = None

    def _num_entering(self, num_latents: int, ranks: int) -> int:
        """How many of each rank's num_latents per step enter the full queue."""
        share = self.config.update_probability
        if share == "auto":
            renewal_steps = max(MIN_RENEWAL_STEPS, RENEWAL_SHARE * int(self.steps))
            share = self.queue.capacity / (renewal_steps * max(1, num_latents) * ranks)
            share = min(1.0, max(MIN_UPDATE_PROBABILITY, share))
        return min(num_latents, max(1, round(share * num_latents)))

    # -- after training: k-means makes the codebook ---------------------------------------------------------------

    def _fit(self, latents: Latents, codebook_size: int | None, seed: int) -> list[float]:
        """k-means over the latents, with any codebook_size. Errors are weighted by `balance`.

        Raises ValueError for fewer latents than codes.
        """
        self.codebook_size = codebook_size or self.codebook_size
        if 0 < len(latents) < self.codebook_size:  # without latents k-means raises the error
            raise ValueError(
                f"a codebook of {self.codebook_size} codes needs as many latents, but there are {len(latents)}; "
                "lower codebook.size, raise codebook.max_latents, or give more shards"
            )
        start = self.table if 0 < len(self.table) <= self.codebook_size else None
        if self.config.balance and len(latents):  # without latents k-means raises the error
            count = 16 * self.dim * self.codebook_size
            count = count if self.dim <= TREE_MAX_DIM else min(count, MAX_SEARCHED)
            sample = latents.sample(count, seed).latents
            latents = latents.mapped(BalancingWeights.of(sample, self.codebook_size, self.config.balance))
        result = kmeans(latents, self.codebook_size, start=start, seed=seed)
        self.table = result.centroids.to(self.table)
        return result.mse

    @torch.no_grad()
    def perturbation_ratio(self, latents: Tensor) -> float | None:
        """Measured with the codebook_size and eta of training.

        An eta of "auto" is determined again from the latents.
        """
        latents = latents.float()[torch.randperm(len(latents), generator=torch.Generator().manual_seed(0))]
        num_queries = min(RATIO_QUERIES, len(latents) // 4)
        queries, others = latents[:num_queries], latents[num_queries:]
        # fewer latents with proportionally fewer neighbours give the same radius
        per_code = min(self.radius_k, len(others) // self.config.codebook_size)
        if per_code < 2:
            return None
        density_k = min(self.config.density_k, per_code)
        twin = type(self)(replace(self.config, latents_per_code=per_code, density_k=density_k)).to(latents.device)
        twin.queue.add(others[: twin.queue.capacity])
        with torch.random.fork_rng(devices=[latents.device] if latents.is_cuda else []):
            torch.manual_seed(0)
            for _ in range(ETA_STEPS if self.config.eta == "auto" else 0):
                twin._perturb(queries)
            moved, _ = twin._perturb(queries)
        energy, error = ((z - queries).square().sum() for z in (moved, self.decode(self.encode(queries))))
        return float(energy / error) if error > 0 else None

    def _eval_forward(self, z: Tensor) -> QuantizerOutput:
        if len(self.table) == 0:  # before fit the decoder gets the latent itself
            return QuantizerOutput(z)
        return super()._eval_forward(z)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        self._index = None
        if f"{prefix}queue.samples" in state_dict:  # a checkpoint; earlier versions did not count steps
            state_dict.setdefault(f"{prefix}steps", torch.tensor(UNKNOWN_STEPS))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, *args: object, **kwargs: object) -> "VPVAE":
        self._index = None  # it is on the old device
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_index": None, "_num_indexed": 0}


def quantization_error(cell_radius: Tensor, dim: int) -> Tensor:
    """Expected squared error of a k-means codebook of K codes: mean over latents, summed over dims.

    cell_radius [N] is D_M of N latents. Their density is f = 1 / (K V_d D_M^d). Zador's law for the best quantizer,
    c K^(-2/d) (E f^(-2/(d+2)))^((d+2)/d), becomes d/(d+2) (E D_M^(2d/(d+2)))^((d+2)/d) for ball-shaped cells.
    Differs: not in the paper. tests/tokenizer/test_vp_vae.py compares it with real k-means: within 12 % on the latents
    that k-means was fitted to; on new normal latents k-means has 12 to 21 % more error.
    """
    power = 2 * dim / (dim + 2)
    return dim / (dim + 2) * cell_radius.pow(power).mean().pow(2 / power)


@dataclass
class BalancingWeights:
    """Weights latents so that k-means places codes with the density of the latents. The weights are about 1 on average.

    The best quantizer of a density f under weights w has codes of density (w f)^(d/(d+2)) (Zador, Gersho 1979). With
    w = f^(2/d) this is f itself, and each code gets the same share of the latents. Up to a factor, f^(-1/d) is the
    radius that contains a fixed number of latents. Differs: not in the paper, whose k-means has no weights.

    points [m, d]: a sample of the latents; weights [m]: their weights. Each latent takes the weight of the nearest one.
    """

    points: Tensor
    weights: Tensor

    @classmethod
    def of(cls, sample: Tensor, codebook_size: int, balance: float) -> "BalancingWeights":
        """sample [m, d]: drawn uniformly, up to 16 d per code. balance: 0 for equal weights, 1 for those above."""
        k = max(1, min(16 * sample.shape[1], round(len(sample) / codebook_size)))
        k = min(k + 1, len(sample))  # the nearest is the latent itself
        radius = build_index(sample).kth_distances(sample, [k])[:, 0]
        positive = radius[radius > 0]
        if len(positive) == 0:
            return cls(sample, torch.ones_like(radius))
        floor = positive.kthvalue(
            1 + len(positive) // 100
        ).values  # duplicate latents (silence) have an infinite density
        weights = radius.clamp(min=floor).pow(-2 * balance)
        return cls(sample, weights / weights.mean())

    def __call__(self, batch: LatentBatch) -> LatentBatch:
        latents = batch.latents
        weights = self.weights.to(latents)[nearest_codeword(latents, self.points.to(latents))]
        return replace(batch, weights=weights)
