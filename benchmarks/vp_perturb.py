"""One VP perturbation step, ours and the official formulation: distances to the whole queue, then top-k.

Legend: N queries, K codes, D dims, M latents per code, S = K * M latents in the queue.
"""

import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.measure import Table, Timing, interleaved, ratio_text
from tokenizer.clustering.neighbors import build_index
from tokenizer.quantizers.vp_vae import VPVAE, VPVAEConfig

ROUNDS = 5
DENSITY_K = 8


@dataclass
class Case:
    """official_queries: number of queries for the official side; its time is scaled to N."""

    codebook_size: int
    dim: int
    queries: int
    official_queries: int


CASES = (Case(1024, 4, 8192, 1024), Case(1024, 4, 512, 512), Case(16384, 5, 8192, 64), Case(16384, 5, 512, 64))


def run() -> Table:
    table = Table(
        "VP perturbation step compared to the official formulation",
        [
            "One training step of the quantizer: D_8 and D_M of the latents and of the proposals, Metropolis-Hastings.",
            "Official formulation: torch.cdist in its chunks of 4194304/K rows and topk(M) over the whole queue, "
            "twice. "
            'Its time is measured on as many queries as the column "official queries" says, and scaled linearly to N.',
            "Ours: the quantizer's forward in train mode (with a k-d tree, the default here) plus rebuilding the index "
            "as often as the queue flushes at an update_probability of 0.01. (The default, auto, reaches 0.01 in long "
            "runs.)",
            "Latents and queue are from N(0, I), the distribution that the norm loss aims for. Before timing we check "
            "that the distances agree to 0.1 % and that with the same random numbers at least 99.8 % of the latents "
            "make the same moves.",
            f"torch threads: {torch.get_num_threads()} on both sides. Medians of {ROUNDS} interleaved rounds. Ratios "
            "compare runs of the same round; the range is in parentheses. CPU is the ratio of the CPU time of all "
            "cores.",
        ],
        [
            "K",
            "D",
            "queue",
            "N",
            "official queries",
            "official, s/step",
            "ours, s/step",
            "rebuild, s/step",
            "times faster",
            "CPU",
        ],
    )
    for case in CASES:
        _measure(case, table)
    return table


def _measure(case: Case, table: Table) -> None:
    torch.manual_seed(0)
    quantizer = VPVAE(VPVAEConfig(codebook_size=case.codebook_size, dim=case.dim, update_probability=0.01)).train()
    queue = quantizer.queue
    queue.add(torch.randn(queue.capacity, case.dim))
    z = torch.randn(case.queries, case.dim)
    few = z[: case.official_queries]
    _prove_equal(quantizer, few)

    def ours() -> None:
        quantizer(z)

    def rebuild() -> None:  # also prepares the index for the step, if this round's flush has dropped it
        quantizer._index = build_index(queue.samples, quantizer.config.backend)

    def official() -> None:
        official_step(few, queue.samples, quantizer.radius_k, eta=1.0)

    found = interleaved({"rebuild": rebuild, "ours": ours, "official": official}, ROUNDS)
    enter = max(1, round(0.01 * case.queries))
    flushes = enter / queue.flush  # per step
    scale = case.queries / case.official_queries
    ours_s = [_plus(s, b, flushes) for s, b in zip(found["ours"], found["rebuild"], strict=True)]
    theirs_s = [Timing(t.wall_s * scale, t.cpu_s * scale) for t in found["official"]]
    rebuilds = [t.wall_s * flushes for t in found["rebuild"]]
    median = statistics.median
    table.rows.append(
        [
            *map(str, (case.codebook_size, case.dim, queue.capacity, case.queries, case.official_queries)),
            f"{median(t.wall_s for t in theirs_s):.3g}",
            f"{median(t.wall_s for t in ours_s):.3g}",
            f"{median(rebuilds):.2g}",
            ratio_text([t.wall_s for t in theirs_s], [t.wall_s for t in ours_s]),
            ratio_text([t.cpu_s for t in theirs_s], [t.cpu_s for t in ours_s]),
        ]
    )
    name = f"K={case.codebook_size} D={case.dim} N={case.queries}"
    table.raw[name] = {side: [vars(t) for t in times] for side, times in found.items()}


def _plus(step: Timing, rebuild: Timing, share: float) -> Timing:
    return Timing(step.wall_s + share * rebuild.wall_s, step.cpu_s + share * rebuild.cpu_s)


def _prove_equal(quantizer: VPVAE, z: Tensor) -> None:
    queue, radius_k = quantizer.queue.samples, quantizer.radius_k
    torch.testing.assert_close(quantizer._distances(z), official_distances(z, queue, radius_k), rtol=1e-3, atol=0)
    torch.manual_seed(1)
    theirs = official_step(z, queue, radius_k, eta=1.0)
    torch.manual_seed(1)
    ours = quantizer(z).z_q
    same = torch.isclose(ours, theirs, rtol=1e-3, atol=1e-4).all(dim=1).float().mean()
    assert same >= 0.998, f"only {same:.2%} of the moves are the same"


# -- the official formulation; see VP-VAE in docs/methods.md --------------------------------------------------------


def official_distances(z: Tensor, queue: Tensor, radius_k: int) -> Tensor:
    """D_8 and D_M of each z: [N, D] -> [N, 2]."""
    rows = max(1, 4_194_304 * radius_k // len(queue))
    parts = []
    for chunk in z.split(rows):
        nearest = torch.cdist(chunk, queue).topk(radius_k, dim=1, largest=False).values
        parts.append(nearest[:, [DENSITY_K - 1, radius_k - 1]])
    return torch.cat(parts)


def official_step(z: Tensor, queue: Tensor, radius_k: int, eta: float) -> Tensor:
    """Propose in the ball of radius eta * D_M, accept by density and reverse proposal: [N, D] -> [N, D]."""
    dim = z.shape[1]
    density, cell = official_distances(z, queue, radius_k).unbind(dim=1)
    noise = torch.randn(z.shape)
    length = eta * cell * torch.rand(len(z)) ** (1 / dim)
    proposal = z + length[:, None] * noise / noise.norm(dim=1, keepdim=True)
    density_there, cell_there = official_distances(proposal, queue, radius_k).unbind(dim=1)
    log_alpha = dim * (density.log() + cell.log() - density_there.log() - cell_there.log())
    inside = (proposal - z).norm(dim=1) < eta * cell_there
    accept = inside & (torch.rand(len(z)).clamp(min=math.ulp(0.0)).log() < log_alpha)
    return torch.where(accept[:, None], proposal, z)
