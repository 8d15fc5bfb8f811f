"""Runs `pack` in tests and reads the shards that it wrote."""

from pathlib import Path

import pytest

from jobs.__main__ import main
from pipeline.corpus.samples import read_samples
from tests.corpus import encoded, picture

PICTURES = {f"p{i}": encoded(picture(seed=i), "jpeg") for i in range(5)}


def pack(source: Path | str, target: Path, *more: str) -> int:
    """Two samples a shard."""
    settings = [f"pack.source={source}", f"pack.shards={target}/s-%03d.tar", "pack.samples_per_shard=2"]
    return main(["pack", *settings, "pack.workers=1", *more])


def packed(target: Path) -> dict[str, dict[str, bytes]]:
    """Key to members, over all shards."""
    samples = [sample for file in sorted(target.glob("*.tar")) for sample in read_samples(str(file))]
    assert all(sample.quarantine_reason is None for sample in samples)
    assert len({sample.key for sample in samples}) == len(samples)
    return {sample.key: sample.members for sample in samples}


def logged(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    [line] = capsys.readouterr().err.splitlines()
    return line
