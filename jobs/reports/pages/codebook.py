"""The page of `codebook`: how well the codes fit the latents, and how evenly they are used."""

from typing import Any

import numpy as np

from jobs.reports.pages import charts, codes
from jobs.reports.pages.document import Header, render
from jobs.reports.pages.metrics import metric
from tokenizer.tokenizer import Tokenizer

HEADLINE = ("latent_error", "perplexity", "utilisation", "dead_codes", "perturbation_ratio")
PLOTTED_LATENTS = 4000


def codebook_page(
    tokenizer: Tokenizer,
    latents: np.ndarray,
    numbers: dict[str, Any],
    counts: np.ndarray,
    curve: list[float],
    *,
    name: str,
    corpus: str,
    command: str,
) -> bytes:
    """latents [N, in_dim]: a sample of them. counts [K]. curve: the error per iteration of k-means."""
    quantizer = tokenizer.autoencoder.quantizer
    bits = np.log2(quantizer.codebook_size) * quantizer.num_quantizers
    facts = {
        "method": quantizer.name,
        "size": f"{quantizer.num_quantizers} x {quantizer.codebook_size:,} codes of {quantizer.dim} numbers",
        "bits": f"{bits:.4g} per token",
        "made from": f"{numbers['num_latents']:,} latents of {corpus}",
        "fit": f"{len(curve)} iterations of k-means" if curve else "kept as training made it",
        "tokenizer": tokenizer.id,
        "codes' id": tokenizer.codebook_id,
    }
    header = Header(
        "codebook", f"Codebook of {name}", _lead(numbers, latents, quantizer.dim), facts, list(HEADLINE), command
    )
    plane = codes.projected(
        latents[:PLOTTED_LATENTS, : quantizer.dim], quantizer.codebook.reshape(-1, quantizer.dim).numpy()
    )
    return render(
        "codebook.html",
        header,
        {"latent_error" if name == "mse" else name: value for name, value in numbers.items()},
        usage=charts.usage_chart(counts),
        usage_words=f"{codes.usage_sentence(numbers)} {codes.usage_facts(counts)}",
        latents=charts.scatter(plane, "first component", "second"),
        curve=_curve(curve),
    )


def _lead(numbers: dict[str, Any], latents: np.ndarray, dim: int) -> str:
    """The error of the codes, and against what."""
    spread = float(latents[:, :dim].var(axis=0).sum())
    error = metric("latent_error").text(numbers["mse"])
    words = f"{codes.usage_sentence(numbers)} Their mean squared distance to the latents is {error}"
    if not spread:
        return f"{words}."
    return f"{words}: {numbers['mse'] / spread:.1%} of what a single code would leave, {spread:.3g}."


def _curve(curve: list[float]) -> Any:
    """None for a single iteration, which is no curve."""
    if len(curve) < 2:
        return None
    steps = [float(i) for i in range(1, len(curve) + 1)]
    return charts.line_chart([charts.Series("", steps, curve)], "iteration of k-means", "error per latent")
