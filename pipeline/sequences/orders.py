"""Orders in which the tokens of one sample become a sequence, and back.

Codes of one codebook, [T] or [H, W], are read in raster order, row by row. Residual and product codes have their Q
codebooks on the first axis, as in token shards: [Q, T] or [Q, H, W]. A code of codebook q becomes q * codebook_size +
code, so that the codebooks do not share numbers. A frame is the Q codes of one place. Then the orders differ:

raster   frame by frame, the Q codes of a frame one after another.
delayed  codebook q is q steps late (MusicGen, arXiv 2306.05284, section 2.2): T + Q - 1 steps of Q tokens, in which
         `pad` fills the places without a code.
layers   codebook after codebook: the T codes of the first, then those of the second, and so on.
"""

import math
from collections.abc import Sequence

import numpy as np

ORDERS = ("raster", "delayed", "layers")


def num_codebooks(shape: Sequence[int], modality: str) -> int:
    """How many codes a frame of a grid of this shape has."""
    plain = 2 if modality == "image" else 1
    return shape[0] if len(shape) > plain else 1


def flatten(
    tokens: np.ndarray, codebooks: int = 1, codebook_size: int = 0, order: str = "raster", pad: int = -1
) -> np.ndarray:
    """The tokens of one sample as a sequence: int64 [length].

    codebooks: their number, which is the first side of tokens if it is above 1.
    Raises ValueError if the first side is another number.
    """
    check_order(order)
    _check_codebooks(tokens.shape, codebooks)
    by_codebook = tokens.reshape(codebooks, tokens.size // codebooks).astype(np.int64)
    frames = by_codebook.T + codebook_size * np.arange(codebooks)
    if order == "layers":
        return frames.T.reshape(-1)
    if order == "raster" or codebooks == 1:
        return frames.reshape(-1)
    steps = np.full((len(frames) + codebooks - 1, codebooks), pad, np.int64)
    for q in range(codebooks):
        steps[q : q + len(frames), q] = frames[:, q]
    return steps.reshape(-1)


def unflatten(
    sequence: np.ndarray, shape: Sequence[int], codebooks: int = 1, codebook_size: int = 0, order: str = "raster"
) -> np.ndarray:
    """The inverse of `flatten`: int64 tokens of this shape.

    Raises ValueError if the sequence has another length, or a token of another codebook than its place, which a model
    may have sampled.
    """
    check_order(order)
    _check_codebooks(shape, codebooks)
    length = sequence_length(math.prod(shape), codebooks, order)
    if len(sequence) != length:
        raise ValueError(f"{len(sequence)} tokens; a grid of {tuple(shape)} in the order {order} has {length}")
    count = math.prod(shape) // codebooks
    if order == "layers":
        frames = np.reshape(sequence, (codebooks, count)).T
    else:
        steps = np.reshape(sequence, (-1, codebooks))
        late = codebooks > 1 and order == "delayed"
        frames = np.stack([steps[q * late : q * late + count, q] for q in range(codebooks)], axis=1)
    codes = frames.astype(np.int64) - codebook_size * np.arange(codebooks)
    wrong = (codes < 0) | (codes >= codebook_size if codebook_size else False)
    if wrong.any():
        raise ValueError(f"token {int(frames[wrong][0])} is not one of the codebook of its place")
    return codes.T.reshape(tuple(shape))


def sequence_length(num_tokens: int, codebooks: int, order: str) -> int:
    """Length of the sequence of a sample with that many tokens."""
    return num_tokens + codebooks * (codebooks - 1) if order == "delayed" else num_tokens


def _check_codebooks(shape: Sequence[int], codebooks: int) -> None:
    if codebooks > 1 and shape[0] != codebooks:
        raise ValueError(f"the shape is {tuple(shape)}; its first side must be {codebooks}, the number of codebooks")


def check_order(order: str) -> None:
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; choose one of: {', '.join(ORDERS)}")
