"""What each number on a page is called, its unit, whether higher or lower is better, and what it means."""

import math
from dataclasses import dataclass, replace
from typing import Any

HIGHER, LOWER, NEITHER = 1, -1, 0


@dataclass(frozen=True)
class Metric:
    """form: the format of a value. better: HIGHER, LOWER or NEITHER. about: a sentence, or empty."""

    label: str
    unit: str = ""
    better: int = NEITHER
    about: str = ""
    form: str = ".4g"

    def text(self, value: Any) -> str:
        """The value without its unit; a dash if it is not defined."""
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "-"
        if isinstance(value, bool) or not isinstance(value, int | float):
            return str(value)
        return f"{value:,.0f}" if self.form == "count" else format(value, self.form)

    def with_unit(self, value: Any) -> str:
        return f"{self.text(value)} {self.unit}".rstrip()

    def with_spread(self, value: Any, spread: float) -> str:
        """The value and its standard deviation, with the same digits; without it if that is 0 or not defined."""
        if not spread > 0 or self.text(value) == "-":
            return self.text(value)
        if self.form[-1] != "g":
            return f"{self.text(value)} ± {self.text(spread)}"
        digits = min(8, max(0, 3 - math.floor(math.log10(abs(value) or 1)) - 1))
        return f"{value:,.{digits}f} ± {spread:,.{digits}f}"

    @property
    def direction(self) -> str:
        return {HIGHER: "higher is better", LOWER: "lower is better", NEITHER: ""}[self.better]


METRICS: dict[str, Metric] = {
    "psnr": Metric(
        "PSNR",
        "dB",
        HIGHER,
        "Peak signal to noise, from the squared error of 8-bit pixels. 30 dB and more looks close to the original.",
        ".2f",
    ),
    "ssim": Metric(
        "SSIM", "", HIGHER, "Structural similarity of local patterns, from 0 to 1 for equal pictures.", ".3f"
    ),
    "mse": Metric("MSE", "", LOWER, "Mean squared error, where the full scale is 1.", ".3g"),
    "pesq": Metric("PESQ", "MOS", HIGHER, "Predicted opinion of listeners about speech, from 1 (bad) to 4.64.", ".2f"),
    "stoi": Metric("STOI", "", HIGHER, "Predicted intelligibility of speech, from 0 to 1.", ".3f"),
    "si_sdr": Metric(
        "SI-SDR",
        "dB",
        HIGHER,
        "Signal to distortion of the waveform, whatever its loudness. At 0 dB the error is as strong as the signal.",
        ".2f",
    ),
    "mel_distance": Metric(
        "mel distance", "decades", LOWER, "Mean distance of the mel spectra, in powers of ten.", ".3f"
    ),
    "perplexity": Metric(
        "perplexity",
        "codes",
        HIGHER,
        "Codes that would carry as much information if all were used equally: from 1 to the codebook size.",
        ",.1f",
    ),
    "perplexity_per_batch": Metric(
        "perplexity per batch",
        "codes",
        HIGHER,
        "Mean perplexity of the tokens of one batch; few tokens make it smaller.",
        ",.1f",
    ),
    "soft_perplexity": Metric("soft perplexity", "codes", HIGHER, "Perplexity of the mean code probabilities.", ",.1f"),
    "cvu": Metric("CVU", "", HIGHER, "Codebook usage: perplexity divided by the number of codes.", ".3f"),
    "cvu_target": Metric("CVU of K", "", HIGHER, "Perplexity divided by the requested number of codes.", ".3f"),
    "cvu_per_dim": Metric("CVU per dimension", "", HIGHER, "Mean usage of the values of each dimension.", ".3f"),
    "utilisation": Metric("codes used", "", HIGHER, "Share of codes that were used at least once.", ".1%"),
    "dead_codes": Metric("dead codes", "codes", LOWER, "Codes that were never used.", "count"),
    "codebook_size": Metric("codebook size K", "codes", NEITHER, "", "count"),
    "target_size": Metric(
        "requested size",
        "codes",
        NEITHER,
        "The codebook size that was asked for; some methods have to round it.",
        "count",
    ),
    "num_quantizers": Metric("quantizers", "", NEITHER, "Tokens at each place of the grid.", "count"),
    "bits_per_pixel": Metric(
        "bit rate", "bits/pixel", LOWER, "Size of the tokens; an 8-bit RGB picture has 24.", ".4g"
    ),
    "kbps": Metric("bit rate", "kbit/s", LOWER, "Size of the tokens; 16-bit mono at 16 kHz has 256.", ".3f"),
    "num_samples": Metric("samples", "", NEITHER, "", "count"),
    "num_bad": Metric("quarantined samples", "", LOWER, "Samples that could not be read or encoded.", "count"),
    "bad_samples": Metric("skipped samples", "", LOWER, "Samples that could not be decoded.", "count"),
    "num_tokens": Metric("tokens", "", NEITHER, "", "count"),
    "tokens_per_batch": Metric("tokens per batch", "", NEITHER, "", "count"),
    "num_latents": Metric("latents", "", NEITHER, "Vectors that the codebook was made from.", "count"),
    "iterations": Metric("iterations", "", NEITHER, "Rounds of k-means.", "count"),
    "latent_error": Metric(
        "error of the codes",
        "",
        LOWER,
        "Mean squared distance of a latent to its code, summed over the channels (mse in the JSON file).",
        ".4g",
    ),
    "perturbation_ratio": Metric(
        "perturbation ratio",
        "",
        NEITHER,
        "Noise in training divided by the error of the codes; "
        "1 means that training met the error that the codebook makes.",
        ".3f",
    ),
    "step": Metric("step", "", NEITHER, "", "count"),
    "steps": Metric("steps", "", NEITHER, "", "count"),
    "loss": Metric("loss", "", LOWER, "Weighted sum of all losses."),
    "l1": Metric("L1 loss", "", LOWER, "Mean absolute error."),
    "log_mse": Metric("log MSE loss", "", LOWER, ""),
    "stft": Metric("STFT loss", "", LOWER, "Distance of the spectra at several window lengths."),
    "mel": Metric("mel loss", "", LOWER, "Distance of the mel spectra."),
    "perceptual": Metric("perceptual loss", "", LOWER, "Distance of the features of a fixed net."),
    "commitment": Metric("commitment loss", "", LOWER, "Distance of the latents from their codes."),
    "codebook": Metric("codebook loss", "", LOWER, "Distance of the codes from their latents."),
    "adversarial": Metric("adversarial loss", "", NEITHER, "What the discriminator makes the decoder change."),
    "discriminator": Metric("discriminator loss", "", NEITHER, ""),
    "accepted": Metric("accepted noise", "", NEITHER, "Share of perturbed latents that were accepted.", ".3f"),
    "energy_ratio": Metric("energy ratio", "", NEITHER, "Energy of the noise relative to that of the latents.", ".3f"),
    "queue_filled": Metric("queue filled", "", NEITHER, "Share of the queue of latents that is filled.", ".1%"),
    "posterior_std": Metric("posterior std", "", NEITHER, ""),
    "revived": Metric("revived codes", "codes", NEITHER, "Unused codes that were moved.", "count"),
    "lr": Metric("learning rate", "", NEITHER, "", ".3g"),
    "samples_per_s": Metric("speed", "samples/s", HIGHER, "Training samples per second, over all workers.", ",.1f"),
    "seconds_per_step": Metric("time per step", "s", LOWER, "", ".3f"),
    "data_wait_share": Metric(
        "data wait", "", LOWER, "Share of the time that the first worker waited for samples.", ".1%"
    ),
    "tokens_per_s": Metric("encoding speed", "tokens/s", HIGHER, "Depends on the machine and its load.", "count"),
    "fit_s": Metric("codebook fit", "s", LOWER, "", ".2f"),
    "fit_iterations": Metric("k-means iterations", "", NEITHER, "", "count"),
    "num_parameters": Metric("parameters", "", NEITHER, "Weights of the autoencoder.", "count"),
    "seeds": Metric("seeds", "", NEITHER, "Trainings of the same settings with different random numbers.", "count"),
    "K": Metric("K", "codes", NEITHER, "Requested codebook size.", "count"),
}
QUALITY_FIRST = ("psnr", "pesq", "si_sdr", "ssim")  # samples are ranked by the first of them that was measured
SUFFIXES = {"_undefined": "samples without", "_samples": "samples of", "_features": "features of"}


def metric(name: str) -> Metric:
    """What we know about a number. An unknown one has its own name as label."""
    if name in METRICS:
        return METRICS[name]
    for suffix, words in SUFFIXES.items():
        if name.endswith(suffix):
            return Metric(f"{words} {metric(name.removesuffix(suffix)).label}", form="count")
    if name.startswith("heldout_"):
        return replace(metric(name.removeprefix("heldout_")), label=f"{metric(name[8:]).label}, held out")
    if "frechet" in name or name.startswith("rfid"):
        return Metric(name, "", LOWER, "Frechet distance between the features of originals and reconstructions.", ".3f")
    if "squeeze" in name or "lpips" in name or "vgg" in name:
        return Metric(name, "", LOWER, "Perceptual distance: of the features of a fixed net.", ".4f")
    return Metric(name)


def ranking(names: "list[str]") -> str | None:
    """The metric by which samples are ranked; None if there is none with a direction."""
    known = [name for name in QUALITY_FIRST if name in names]
    return next(iter(known), next((name for name in names if metric(name).better), None))
