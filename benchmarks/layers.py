"""Our quantizers compared to lucidrains/vector-quantize-pytorch: forward and backward in train mode.

Legend: N latents, K codes, D dims, z [N, D], z_q [N, D].
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import vector_quantize_pytorch as lucidrains
from torch import Tensor, nn

from benchmarks.measure import Table, Timing, interleaved, ratio_text, timed
from tokenizer.quantizers.base.levels import PAPER_LEVELS
from tokenizer.quantizers.base.quantizer import Quantizer, build_quantizer
from tokenizer.quantizers.residual import Residual

ROUNDS, ROUNDS_OF_LARGE = 5, 3
MIN_TIMED_S = 0.05  # a timing repeats calls for about this long
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_QUANTIZERS = 4
SMALL = [(1024, dim, num_latents) for dim in (4, 8, 64) for num_latents in (512, 8192)]  # K, D, N
LARGE = (16384, 8, 8192)  # theirs takes 10 s per call on two cores
TABLES = [*SMALL, (16384, 5, 512), (16384, 8, 512), (16384, 64, 512), LARGE]
SCALAR = [(size, dim, num_latents) for size, dim in ((1024, 4), (16384, 5)) for num_latents in (512, 8192)]


@dataclass
class Step:
    """The output of a layer for z. indices is None for methods whose training has no indices."""

    z_q: Tensor
    indices: Tensor | None
    loss: Tensor


@dataclass
class Pair:
    """One method on both sides, with the same codes. after_step: checks that a step changes both states equally."""

    ours: Quantizer
    theirs: nn.Module
    weights: dict[str, float]  # of our losses, to make them equal to theirs
    same_gradients: bool = True
    after_step: Callable[[Tensor], None] | None = None

    def our_step(self, z: Tensor) -> Step:
        out = self.ours(z)
        weighed = [self.weights[name] * loss for name, loss in out.losses.items()]
        return Step(out.z_q, out.indices, torch.stack(weighed).sum() if weighed else z.new_zeros(()))

    def their_step(self, z: Tensor) -> Step:
        z_q, indices, *loss = self.theirs(z[None])  # they take [B, N, D]
        return Step(z_q[0], indices[0], loss[0].mean() if loss else z.new_zeros(()))


Case = tuple[int, int, int]  # K, D, N
MakePair = Callable[[int, Tensor], Pair]  # arguments: K, and the latents that both sides get


def run() -> Table:
    table = Table(
        "Quantizer layers compared to lucidrains/vector-quantize-pytorch",
        [
            f"vector-quantize-pytorch {version('vector-quantize-pytorch')}. One call is a forward pass in "
            "train mode and a backward pass to the latents and to learned codes, from a random gradient of z_q plus "
            "the losses.",
            "Both sides have the same codes and settings: straight-through (their default is the rotation trick), no "
            "k-means start, no replacement of dead codes; vq: codes learned by gradient, commitment weight 1; ema_vq: "
            f"decay 0.99; sim_vq: bias in both; rvq: {NUM_QUANTIZERS} layers of vq; fsp: tanh, quantize_rate 0.",
            "Before timing we check that both sides give the same indices for at least 99.9 % of the latents (ties "
            "differ), the same z_q for those to 1e-4, the same gradients of latents and codes, and the same codes "
            "after a step of ema_vq. For rvq we check only indices and z_q, because their gradient of z_q differs from "
            "ours by a factor of 4. fsp is checked in train mode with the same random numbers.",
            "Latents and codes are drawn from N(0, I). fsq and fsp have the papers' levels for K.",
            f"Device: {DEVICE}; torch threads: {torch.get_num_threads()} on both sides. Medians of {ROUNDS} "
            f"interleaved rounds ({ROUNDS_OF_LARGE} at K={LARGE[0]} and N={LARGE[2]}). Ratios compare runs of the same "
            "round; the range is in parentheses. CPU is the ratio of the CPU time of all cores.",
        ],
        ["method", "K", "D", "N", "theirs, ms", "ours, ms", "times faster", "CPU"],
    )
    for method, (make_pair, cases) in METHODS.items():
        for case in cases:
            _measure(method, make_pair, case, table)
    return table


def _measure(method: str, make_pair: MakePair, case: Case, table: Table) -> None:
    codebook_size, dim, num_latents = case
    torch.manual_seed(0)
    z = torch.randn(num_latents, dim, device=DEVICE, requires_grad=True)
    gradient = torch.randn_like(z)
    pair = make_pair(codebook_size, z)
    prove_equal(pair, z, gradient)

    def ours() -> None:
        call(pair.our_step, z, gradient, pair.ours)

    def theirs() -> None:
        call(pair.their_step, z, gradient, pair.theirs)

    found = interleaved_calls({"ours": ours, "theirs": theirs}, ROUNDS_OF_LARGE if case == LARGE else ROUNDS)
    wall = {side: [t.wall_s for t in times] for side, times in found.items()}
    cpu = {side: [t.cpu_s for t in times] for side, times in found.items()}
    table.rows.append(
        [
            *(method, str(codebook_size), str(dim), str(num_latents)),
            *(f"{1e3 * statistics.median(wall[side]):.3g}" for side in ("theirs", "ours")),
            *(ratio_text(seconds["theirs"], seconds["ours"]) for seconds in (wall, cpu)),
        ]
    )
    name = f"{method} K={codebook_size} D={dim} N={num_latents}"
    table.raw[name] = {side: [vars(t) for t in times] for side, times in found.items()}


def interleaved_calls(sides: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[Timing]]:
    """Times of one call. Each is the mean over MIN_TIMED_S, because the sides may differ by orders of magnitude."""
    calls = {side: max(1, math.ceil(MIN_TIMED_S / timed(work).wall_s)) for side, work in sides.items()}
    found = interleaved({side: repeated(work, calls[side]) for side, work in sides.items()}, rounds, warmups=0)
    return {side: [Timing(t.wall_s / calls[side], t.cpu_s / calls[side]) for t in found[side]] for side in sides}


def repeated(work: Callable[[], None], times: int) -> Callable[[], None]:
    def works() -> None:
        for _ in range(times):
            work()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return works


def call(step: Callable[[Tensor], Step], z: Tensor, gradient: Tensor, module: nn.Module) -> tuple[Step, list[Tensor]]:
    """Forward and backward. Returns the step, and the gradients of z and of each parameter."""
    out = step(z)
    outputs, gradients = [out.z_q], [gradient]
    if out.loss.requires_grad:
        outputs.append(out.loss)
        gradients.append(torch.ones_like(out.loss))
    return out, list(torch.autograd.grad(outputs, [z, *module.parameters()], gradients))


# -- checks -----------------------------------------------------------------------------------------------------------


def prove_equal(pair: Pair, z: Tensor, gradient: Tensor) -> None:
    torch.manual_seed(1)
    ours, our_gradients = call(pair.our_step, z, gradient, pair.ours)
    torch.manual_seed(1)
    theirs, their_gradients = call(pair.their_step, z, gradient, pair.theirs)
    assert theirs.indices is not None
    indices = ours.indices if ours.indices is not None else pair.ours.encode(z)
    same = indices == theirs.indices
    same = same.all(dim=1) if same.ndim == 2 else same
    assert same.float().mean() >= 0.999, f"only {same.float().mean():.2%} of the indices are the same"
    torch.testing.assert_close(ours.z_q[same], theirs.z_q[same], rtol=1e-4, atol=1e-4)
    if pair.same_gradients:
        torch.testing.assert_close(our_gradients[0][same], their_gradients[0][same], rtol=1e-3, atol=1e-3)
        for mine, other in zip(our_gradients[1:], their_gradients[1:], strict=True):
            off = (mine - other.reshape(mine.shape)).norm() / other.norm()
            assert off < 0.05, (
                f"the gradients of the codes differ by {off:.2%}"
            )  # because of ties, one latent in 1000 may get another code
    if pair.after_step is not None:
        pair.after_step(indices)


# -- the methods, with the same codes on both sides -------------------------------------------------------------------


def vq(codebook_size: int, z: Tensor) -> Pair:
    dim = z.shape[1]
    ours = our_quantizer({"name": "vq_vae", "codebook_size": codebook_size, "dim": dim})
    theirs = lucidrains.VectorQuantize(
        dim=dim, codebook_size=codebook_size, rotation_trick=False, learnable_codebook=True, ema_update=False
    ).to(DEVICE)
    theirs._codebook.embed.data.copy_(ours.embedding.data[None])
    return Pair(ours, theirs, {"codebook": 1.0, "commitment": 1.0})


def ema_vq(codebook_size: int, z: Tensor) -> Pair:
    dim = z.shape[1]
    ours = our_quantizer({"name": "ema_vq", "codebook_size": codebook_size, "dim": dim, "decay": 0.99})
    ours.embedding.normal_()
    ours.embedding_sum.copy_(ours.embedding)
    ours.cluster_size.fill_(1)
    theirs = lucidrains.VectorQuantize(
        dim=dim, codebook_size=codebook_size, rotation_trick=False, decay=0.99, commitment_weight=0.25
    ).to(DEVICE)
    theirs._codebook.embed.copy_(ours.embedding[None])
    theirs._codebook.embed_avg.copy_(ours.embedding[None])

    def same_codes(indices: Tensor) -> None:
        used = indices.unique()  # ours does not move unused codes
        off = (ours.embedding - theirs._codebook.embed[0])[used].norm() / ours.embedding[used].norm()
        assert off < 1e-3, f"the codes differ by {off:.2%} after a step"

    return Pair(ours, theirs, {"commitment": 0.25}, after_step=same_codes)


def sim_vq(codebook_size: int, z: Tensor) -> Pair:
    dim = z.shape[1]
    ours = our_quantizer({"name": "sim_vq", "codebook_size": codebook_size, "dim": dim})
    theirs = lucidrains.SimVQ(
        dim=dim, codebook_size=codebook_size, codebook_transform=nn.Linear(dim, dim), rotation_trick=False
    ).to(DEVICE)
    nn.init.orthogonal_(ours.projection.weight, gain=dim**0.5)  # codes from N(0, I), like those of the other methods
    theirs.frozen_codebook.copy_(ours.frozen)
    theirs.code_transform.load_state_dict(ours.projection.state_dict())
    return Pair(ours, theirs, {"codebook": 1.0, "commitment": 0.25})


def rvq(codebook_size: int, z: Tensor) -> Pair:
    dim = z.shape[1]
    base = {"name": "vq_vae", "codebook_size": codebook_size, "dim": dim}
    ours = our_quantizer({"name": "residual", "base": base, "num_quantizers": NUM_QUANTIZERS})
    assert isinstance(ours, Residual)
    ours(z)  # measures the scale of each layer's residual, which scales the codes
    theirs = lucidrains.ResidualVQ(
        **{"dim": dim, "codebook_size": codebook_size, "num_quantizers": NUM_QUANTIZERS},
        **{"rotation_trick": False, "learnable_codebook": True, "ema_update": False},
    ).to(DEVICE)
    for layer, codes in zip(theirs.layers, ours.codebook, strict=True):
        layer._codebook.embed.data.copy_(codes[None])
    return Pair(ours, theirs, {"codebook": 1.0, "commitment": 1.0}, same_gradients=False)


def fsq(codebook_size: int, z: Tensor, edges: str) -> Pair:
    ours = our_quantizer({"name": "fsq", "codebook_size": codebook_size, "edges": edges})
    theirs = lucidrains.FSQ(PAPER_LEVELS[codebook_size], preserve_symmetry=edges == "symmetric").to(DEVICE)
    return Pair(ours, theirs, {})


def fsp(codebook_size: int, z: Tensor) -> Pair:
    ours = our_quantizer({"name": "fsp", "codebook_size": codebook_size})
    theirs = lucidrains.FSP(PAPER_LEVELS[codebook_size]).to(DEVICE)
    return Pair(ours, theirs, ours.default_loss_weights)


METHODS: dict[str, tuple[MakePair, list[Case]]] = {
    "vq": (vq, TABLES),
    "ema_vq": (ema_vq, TABLES),
    "sim_vq": (sim_vq, TABLES),
    "rvq": (rvq, SMALL),
    "fsq, symmetric": (partial(fsq, edges="symmetric"), SCALAR),
    "fsq, original": (partial(fsq, edges="original"), SCALAR),
    "fsp": (fsp, SCALAR),
}


def our_quantizer(settings: dict[str, Any]) -> Any:
    """In train mode, and past the first batch, so that k-means does not replace the codes."""
    quantizer = build_quantizer(settings).to(DEVICE).train()
    for name, buffer in quantizer.named_buffers():
        if name.split(".")[-1] == "initialised":
            buffer.fill_(True)
    return quantizer
