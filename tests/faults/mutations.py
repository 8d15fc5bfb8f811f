"""Turns a good file into a hostile one. Each mutation takes the bytes, a seeded random generator, and other files."""

import random
import re
from collections.abc import Callable, Sequence

Mutation = Callable[[bytes, random.Random, Sequence[bytes]], bytes]
HEADER_BYTES = 600  # most fields of most formats are there
ORDERS = ("little", "big")


def _place(data: bytes, rng: random.Random) -> int:
    """A position in the data, half of the time in its header."""
    return rng.randrange(max(1, min(len(data), HEADER_BYTES) if rng.random() < 0.5 else len(data)))


def _block(data: bytes, rng: random.Random) -> tuple[int, int]:
    """Start and end of a part, short or long."""
    start = _place(data, rng)
    return start, start + rng.choice([1, 4, rng.randrange(1, 64), rng.randrange(1, 2 + len(data) // 2)])


def _with(data: bytes, start: int, end: int, new: bytes) -> bytes:
    return data[:start] + new + data[end:]


def flip(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    flipped = bytearray(data or b"\0")
    for _i in range(rng.choice([1, 1, 2, 8])):
        flipped[_place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def cut(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    return data[: rng.choice([rng.randrange(len(data) + 1), len(data) - rng.randrange(min(len(data), 40) + 1)])]


def _overwrite(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    start, end = _block(data, rng)
    return _with(data, start, end, rng.randbytes(end - start))


def _remove(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    return _with(data, *_block(data, rng), b"")


def _insert(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    start, end = _block(data, rng)
    return _with(data, start, start, rng.randbytes(end - start))


def _repeat(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    start, end = _block(data, rng)
    return _with(data, start, start, data[start:end] * rng.choice([1, 2, 50, 1000 if end - start < 100 else 3]))


def _swap(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    a, b, c = sorted(rng.randrange(len(data) + 1) for _i in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def _fill(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    start, end = _block(data, rng)
    return _with(data, start, end, rng.choice([b"\0", b"\xff", b"\x7f", b"\x80"]) * (end - start))


def _splice(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    other, share = rng.choice(others), rng.random()
    return data[: int(share * len(data))] + other[int(rng.choice([share, rng.random()]) * len(other)) :]


def _field(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    """An integer becomes 0, the largest, the most negative one, or another by the border."""
    start, width = _place(data, rng), rng.choice([1, 2, 4, 8])
    bits = 8 * width
    value = rng.choice(
        [0, 1, 2**bits - 1, 2 ** (bits - 1), 2 ** (bits - 1) - 1, 2 ** (bits // 2), rng.getrandbits(bits)]
    )
    return _with(data, start, start + width, value.to_bytes(width, rng.choice(ORDERS)))  # type: ignore[arg-type]


def _claim(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """An integer that could be a size claims far more than there is."""
    for _i in range(50):
        start, width, order = _place(data, rng), rng.choice([2, 4, 4, 8]), rng.choice(ORDERS)
        value = int.from_bytes(data[start : start + width], order)  # type: ignore[arg-type]
        if 4 <= value <= 4 * len(data):
            most = 2 ** (8 * width) - 1
            large = min(most, rng.choice([value * 1000, value * 10**6, most, most // 2, value + 2**24]))
            return _with(data, start, start + width, large.to_bytes(width, order))  # type: ignore[arg-type]
    return _field(data, rng, others)


def _number(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """A number in digits becomes another one, of the same width or longer."""
    found = list(re.finditer(rb"-?\d+", data[: 64 * HEADER_BYTES]))
    if not found:
        return _field(data, rng, others)
    match = rng.choice(found)
    width = match.end() - match.start()
    new = rng.choice(
        [b"0", b"-1", b"9" * width, b"7" * width, b"9" * 19, b"1" + b"0" * 400, b"1e999", b"0.5", b"", b"NaN"]
    )
    return _with(data, match.start(), match.end(), new)


def _noise(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    """Random bytes after a valid header."""
    return data[: rng.randrange(4, 200)] + rng.randbytes(rng.randrange(4096))


MUTATIONS: dict[str, Mutation] = {
    "bits flipped": flip,
    "cut": cut,
    "bytes overwritten": _overwrite,
    "block removed": _remove,
    "bytes inserted": _insert,
    "block repeated": _repeat,
    "blocks swapped": _swap,
    "block filled": _fill,
    "halves of two files": _splice,
    "integer at a limit": _field,
    "size beyond the bytes": _claim,
    "number in digits": _number,
    "noise after the header": _noise,
}
