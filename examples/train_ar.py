r"""Trains a small GPT on token shards, samples from it, and decodes the samples with the frozen tokenizer.

  python examples/train_ar.py runs/demo/tokens runs/demo/tokenizers/vp_vae-K1024 --out runs/demo/generate --minutes 2

It works on pictures and on sound, and reads only what every user can: `TokenDataset`, `pack` and `Tokenizer`.
--heldout OUT2 measures the loss on an output that is not trained on. --classes COLUMN adds an integer column as class:
the samples then take all classes in turn. Rerun the same command to continue a run that was stopped.

OUT/result.json holds the losses: nats per token, and bits per sample (the sum over its tokens, without special tokens).
OUT/curve.png is the loss curve, OUT/samples.png a sheet of decoded samples; sounds are also OUT/sample-*.wav.
"""

import argparse
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenmill import TokenDataset, Tokenizer, pack, unflatten

SAVE_EVERY_S = 60


class Attention(nn.Module):
    """Causal self-attention with rotary positions (RoFormer, arXiv 2104.09864)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, turn: Tensor, mask: Tensor | None, cache: list[Tensor] | None) -> Tensor:
        """x [B, T, dim]; turn complex [B, 1, T, dim / heads / 2]; mask bool [B, 1, T, T], True where a token may look.

        cache: keys and values of earlier tokens, which x comes after. Then there is no mask.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = _turned(q, turn), _turned(k, turn)
        if cache is not None:
            k, v = (
                torch.cat([old, new], dim=2)
                for old, new in zip(cache or (k[:, :, :0], v[:, :, :0]), (k, v), strict=True)
            )
            cache[:] = [k, v]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).type_as(x)


class GPT(nn.Module):
    def __init__(self, vocab_size: int, dim: int, layers: int, heads: int):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab_size, dim), nn.Linear(dim, vocab_size, bias=False)
        self.attention = nn.ModuleList(Attention(dim, heads) for _ in range(layers))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
            for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(layers + 1))
        self.register_buffer("rates", 10_000.0 ** -torch.linspace(0, 1, dim // heads // 2), persistent=False)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        documents: Tensor | None = None,
        caches: list[list[Tensor]] | None = None,
    ) -> Tensor:
        """All int64 [B, T], as `pack` makes them. Returns the logits of the next token [B, T, vocab_size].

        caches: one for each layer, of the earlier tokens of one document; then tokens [B, 1] is its next token.
        """
        mask = None if documents is None else _visible(documents)
        angles = positions[:, None, :, None] * self.rates
        turn = torch.polar(torch.ones_like(angles), angles)
        x = self.embed(tokens)
        for i, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            x = x + attention(self.norms[i](x), turn, mask, caches[i] if caches else None)
            x = x + mlp(x)
        return self.head(self.norms[-1](x))


def _visible(documents: Tensor) -> Tensor:
    """Which tokens [B, 1, T, T] a token may look at: the earlier ones of its document."""
    length = documents.shape[1]
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same & torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()


def loss_of(model: GPT, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies in nats, and the number of tokens that were predicted."""
    documents, tokens = batch["documents"], batch["tokens"]
    logits = model(tokens[:, :-1], batch["positions"][:, :-1], documents[:, :-1])
    counts = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
    return F.cross_entropy(logits[counts], tokens[:, 1:][counts], reduction="sum"), counts.sum()


class Blocks:
    """Batches of packed blocks, epoch after epoch. Documents: a start token (or the class), then the codes."""

    def __init__(self, url: str, args: argparse.Namespace):
        columns = (args.classes,) if args.classes else ()
        self.dataset = TokenDataset(url, columns=columns, shuffle_window=args.window, seed=args.seed)
        size = self.dataset.layout.codebook_size
        codebooks = pack(self.dataset, 1).codebooks
        start: dict[str, Any] = {"bos": codebooks * size}
        if args.classes:
            start = {"condition": args.classes, "condition_offset": codebooks * size}
        self.packed = pack(self.dataset, args.block, fit="concat" if args.sound else "best", **start)
        self.start, self.batch_size, self.device = codebooks * size, args.batch_size, args.device

    def classes(self, name: str) -> int:
        """1 + the largest class in the output."""
        return 1 + max(int(row[name]) for row in self.dataset)

    def forever(self) -> Iterator[dict[str, Tensor]]:
        if not self.dataset.num_rows:
            raise SystemExit(f"{self.dataset.output.url} has no rows to train on")
        blocks = itertools.chain.from_iterable(itertools.repeat(self.packed))
        while True:
            yield self._stacked(list(itertools.islice(blocks, self.batch_size)))

    def once(self, limit: int) -> Iterator[dict[str, Tensor]]:
        self.packed.set_epoch(0)
        blocks = itertools.islice(self.packed, limit)
        while batch := list(itertools.islice(blocks, self.batch_size)):
            yield self._stacked(batch)

    def _stacked(self, blocks: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(np.stack([b[name] for b in blocks])).to(self.device) for name in blocks[0]}


def train(model: GPT, blocks: Blocks, args: argparse.Namespace) -> list[tuple[int, float]]:
    """Trains for --steps steps or --minutes minutes. Returns (step, nats per token) of all steps so far."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    saved = args.out / "state.pt"
    curve: list[tuple[int, float]] = []
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        blocks.packed.load_state_dict(json.loads(state["blocks"]))
        curve = [tuple(point) for point in state["curve"]]
        print(f"continues after step {len(curve)}")
    begun = saved_at = time.monotonic()
    batches = blocks.forever()
    while len(curve) < args.steps and time.monotonic() - begun < 60 * args.minutes:
        step, batch = len(curve) + 1, next(batches)  # drawn only to be trained on: the state is saved after it
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, step / 50) * (0.55 + 0.45 * math.cos(math.pi * step / args.steps))
        nats, count = loss_of(model, batch)
        optimizer.zero_grad()
        (nats / count).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        curve.append((step, float(nats.detach() / count)))
        if step % 20 == 0:
            print(f"step {step}/{args.steps}  {np.mean([nats for _, nats in curve[-20:]]):.3f} nats/token", flush=True)
        if time.monotonic() - saved_at > SAVE_EVERY_S:
            save(saved, model, optimizer, blocks, curve)
            saved_at = time.monotonic()
    save(saved, model, optimizer, blocks, curve)
    return curve


def save(file: Path, model: GPT, optimizer: torch.optim.Optimizer, blocks: Blocks, curve: list) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "blocks": json.dumps(blocks.packed.state_dict()),
        "curve": [list(point) for point in curve],
    }
    torch.save(state, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)


@torch.inference_mode()
def heldout_nats(model: GPT, blocks: Blocks, limit: int) -> float:
    """Nats per token over at most `limit` blocks."""
    sums = [loss_of(model, batch) for batch in blocks.once(limit)]
    return float(sum(nats for nats, _ in sums) / sum(count for _, count in sums))


@torch.inference_mode()
def sample(model: GPT, starts: Tensor, ranges: list[range], temperature: float) -> Tensor:
    """Sequences of codes [B, length]. ranges: the codes that may come at each place."""
    caches: list[list[Tensor]] = [[] for _ in model.attention]
    tokens = [starts[:, None]]
    for place, codes in enumerate(ranges):
        logits = model(tokens[-1], torch.full_like(tokens[-1], place), caches=caches)[:, -1, codes.start : codes.stop]
        tokens.append(torch.multinomial((logits.float() / temperature).softmax(-1), 1) + codes.start)
    return torch.cat(tokens[1:], dim=1)


def generate(model: GPT, blocks: Blocks, count: int, args: argparse.Namespace) -> list[np.ndarray]:
    """Grids of tokens in the commonest shape of the output, at most --length tokens of a sound."""
    dataset = blocks.dataset
    shapes = Counter(row["tokens"].shape for row in itertools.islice(dataset, 2000))
    shape = max(shapes, key=lambda one: (shapes[one], one))
    if args.sound:
        shape = (*shape[:-1], min(shape[-1], max(1, args.length // blocks.packed.codebooks)))  # [T] or [Q, T]
    size, codebooks = dataset.layout.codebook_size, blocks.packed.codebooks
    ranges = [range(q * size, (q + 1) * size) for _ in range(math.prod(shape) // codebooks) for q in range(codebooks)]
    grids: list[np.ndarray] = []
    while len(grids) < count:
        numbers = torch.arange(len(grids), min(count, len(grids) + args.sample_batch), device=args.device)
        starts = blocks.start + (numbers % args.num_classes if args.classes else torch.zeros_like(numbers))
        drawn = sample(model, starts, ranges, args.temperature).cpu().numpy()
        grids += [unflatten(sequence, shape, codebooks, size) for sequence in drawn]
    return grids


def draw_curve(curve: list[tuple[int, float]], heldout: float | None, file: Path, title: str) -> None:
    if not curve:
        raise SystemExit("no step was trained; give more --minutes or --steps")
    steps, nats = np.array(curve).T
    width = max(1, len(nats) // 50)
    smooth = np.convolve(nats, np.ones(width) / width, mode="valid")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, nats / math.log(2), color="0.8", label="each step")
    axes.plot(steps[width - 1 :], smooth / math.log(2), label=f"mean of {width} steps")
    if heldout is not None:
        axes.axhline(heldout / math.log(2), color="C1", linestyle="--", label="held out, at the end")
    axes.set(title=title, xlabel="step", ylabel="cross-entropy, bits per token")
    axes.legend()
    figure.savefig(file, dpi=120)


def draw_samples(decoded: list[np.ndarray], tokenizer: Tokenizer, file: Path, title: str) -> None:
    columns = min(8, len(decoded))
    rows = -(-len(decoded) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.3 * columns, 1.3 * rows + 0.6), squeeze=False)
    for one in axes.flat:
        one.axis("off")
    for one, made in zip(axes.flat, decoded, strict=False):
        if tokenizer.modality.name == "image":
            one.imshow(made)
        else:
            one.specgram(made[:, 0] + 1e-6, Fs=tokenizer.preprocessing["sample_rate"], cmap="magma")
    figure.suptitle(title, fontsize=9)
    figure.savefig(file, dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", help="an output of `tokenmill tokenize`")
    parser.add_argument("tokenizer", help="the tokenizer that wrote it")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--heldout", default="", help="an output of the same tokenizer to measure the loss on")
    parser.add_argument("--classes", default="", help="an integer column of the rows, 0 and more")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop training after so many minutes")
    parser.add_argument("--block", type=int, default=512, help="tokens per block; at least one sample and its start")
    parser.add_argument("--batch-size", type=int, default=8, help="blocks per step")
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--window", type=int, default=4096, help="rows to shuffle at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=32, help="samples on the sheet")
    parser.add_argument("--sample-batch", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--length", type=int, default=400, help="tokens of a sampled sound at most")
    parser.add_argument("--save-samples", type=int, default=0, help="also write so many samples to OUT/samples.npy")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_pretrained(args.tokenizer, args.device)
    args.sound = tokenizer.modality.name == "audio"
    blocks = Blocks(args.tokens, args)
    if blocks.dataset.layout.tokenizer_id != tokenizer.id:
        raise SystemExit(
            f"{args.tokens} was written by tokenizer {blocks.dataset.layout.tokenizer_id}, not by this one"
        )
    args.num_classes = blocks.classes(args.classes) if args.classes else 1
    model = GPT(blocks.start + args.num_classes, args.dim, args.layers, args.heads).to(args.device)
    params = sum(weight.numel() for weight in model.parameters())
    print(f"{params / 1e6:.1f} M parameters, {blocks.dataset.num_rows} samples, {blocks.start} codes, on {args.device}")
    begun = time.monotonic()
    curve = train(model, blocks, args)
    trained_s = time.monotonic() - begun
    model.eval()
    heldout = heldout_nats(model, Blocks(args.heldout, args), 2000) if args.heldout else None
    nats = float(np.mean([nats for _, nats in curve[-50:]])) if heldout is None else heldout
    length = float(blocks.dataset.lengths().mean())
    about = f"{args.tokenizer}, {len(curve)} steps"
    draw_curve(curve, heldout, args.out / "curve.png", f"GPT of {params / 1e6:.1f} M parameters on {about}")
    torch.manual_seed(args.seed)
    made = tokenizer.decode(generate(model, blocks, max(args.samples, args.save_samples), args))
    draw_samples(made[: args.samples], tokenizer, args.out / "samples.png", f"sampled, then decoded: {about}")
    if args.sound:
        write_sounds(made[:8], tokenizer.preprocessing["sample_rate"], args.out)
    if args.save_samples:
        np.save(args.out / "samples.npy", np.stack(made[: args.save_samples]))
    result = {
        "tokenizer": tokenizer.id,
        "steps": len(curve),
        "parameters": params,
        "seconds": round(trained_s, 1),
        "nats_per_token": nats,
        "bits_per_sample": nats / math.log(2) * length,
        "measured_on": "held out" if args.heldout else "training, last 50 steps",
    }
    (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{nats:.3f} nats/token, {result['bits_per_sample']:.0f} bits per sample ({result['measured_on']})")
    print(f"results in {args.out}: samples.png, curve.png, result.json")


def write_sounds(made: list[np.ndarray], rate: int, folder: Path) -> None:
    import soundfile

    for i, sound in enumerate(made):
        soundfile.write(folder / f"sample-{i}.wav", sound, rate, subtype="PCM_16")


if __name__ == "__main__":
    main()
