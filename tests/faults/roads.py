"""Gives a hostile file to the product as a user would, and judges the result: for `tests.faults.fuzz`.

Each road returns the message of a refusal, or None if the file was read and the result is valid. It raises Wrong for a
result that is not, and passes on every exception that is none of the product's own.
"""

import contextlib
import io
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jobs.__main__ import main as run_command
from pipeline.corpus.samples import Sample, read_samples
from pipeline.errors import BrokenOutput, OutputMismatch, ShardError
from pipeline.tokens import TokenDataset
from tests.faults.seeds import GOLDEN, Seed
from tokenizer.errors import BadSample
from tokenizer.modalities.base import Modality, build_modality

MAX_PIXELS, MAX_SECONDS = 1_000_000, 30
SETTINGS = {
    "image": ({"color_rules": 2}, {"color_rules": 1, "short_side": 64, "center_crop": True}),
    "audio": ({"downmix": "bs775", "gapless": True}, {"allow_truncated": True, "downmix": "mean"}),
}
LIMITS = {"image": {"max_pixels": MAX_PIXELS}, "audio": {"max_seconds": MAX_SECONDS}}
TABLES = ("parquet", "csv", "tsv")


class Wrong(Exception):
    """The product returned something that is not what the file holds, or a message that does not help."""


@dataclass(frozen=True)
class Variant:
    """file: a damaged `seed`. is_detectable: the file must be refused, or give what the seed gives. settings: which of
    those for its modality are used, see `SETTINGS`.
    """

    kind: str
    seed: Seed
    file: bytes
    is_detectable: bool = False
    settings: int = 0


class Roads:
    """folder: for files, on this machine. Remembers what the seeds give."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.modalities = {
            name: [build_modality(name, {**LIMITS[name], **settings}) for settings in both]
            for name, both in SETTINGS.items()
        }
        self._originals: dict[Seed, Any] = {}
        for name in ("out", "out_audio"):
            shutil.copytree(GOLDEN / name, folder / name)

    def content(self, variant: Variant) -> Any:
        """What the file holds, as something that can be compared."""
        for modality in (one[variant.settings] for one in self.modalities.values()):
            if variant.seed.extension in modality.extensions:
                return _array(modality, variant)
        if variant.kind in TABLES:
            return self._pack(variant)
        return self._samples(variant) if variant.kind.startswith("tar") else self._rows(variant)

    def refusal(self, variant: Variant) -> str | None:
        try:
            content = self.content(variant)
        except REFUSALS as error:
            return _helpful(str(error))
        if variant.is_detectable and not _equal(content, self._original(variant)):
            raise Wrong("the damage was not detected, and the content differs")
        return None

    def _original(self, variant: Variant) -> Any:
        """What the seed gives; None if it is refused itself."""
        seed = variant.seed
        if seed not in self._originals:
            self._originals[seed] = None
            with contextlib.suppress(*REFUSALS):
                self._originals[seed] = self.content(Variant(variant.kind, seed, seed.file))
        return self._originals[seed]

    def _samples(self, variant: Variant) -> list[tuple[str, dict[str, bytes]]]:
        path = self.folder / f"a.{variant.seed.extension}"
        path.write_bytes(variant.file)
        return [_checked(sample) for sample in read_samples(str(path))]

    def _pack(self, variant: Variant) -> list[tuple[str, dict[str, bytes]]]:
        """What `pack` writes, and what the reader of shards finds in it."""
        path, target = self.folder / f"t.{variant.seed.extension}", self.folder / "packed"
        path.write_bytes(variant.file)
        shutil.rmtree(target, ignore_errors=True)
        out, log = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(log):
            code = run_command(["pack", f"pack.source={path}", f"pack.shards={target}/s-%03d.tar", "pack.workers=1"])
        lines = log.getvalue().splitlines()
        if code == 2 and len(lines) == 1:
            raise _Refused(lines[0].removeprefix("tokenmill pack: "))
        if code or lines:
            raise Wrong(f"pack ends with {code} and {lines}")
        samples = [sample for shard in sorted(target.glob("*.tar")) for sample in read_samples(str(shard))]
        if bad := [sample.quarantine_reason for sample in samples if sample.quarantine_reason]:
            raise Wrong(f"pack wrote a sample that the reader refuses: {bad[0]}")
        return [(sample.key, sample.members) for sample in samples]

    def _rows(self, variant: Variant) -> dict[str, tuple[bytes, tuple[int, ...]]]:
        path = self.folder / variant.seed.extension
        path.write_bytes(variant.file)
        try:
            dataset = TokenDataset(str(self.folder / Path(variant.seed.extension).parts[0]), columns=("source_index",))
            rows = {
                f"{row['source_index']}/{row['key']}": (row["tokens"].tobytes(), row["tokens"].shape) for row in dataset
            }
            if dataset.num_rows != len(rows):
                raise Wrong(f"{dataset.num_rows} rows are announced, {len(rows)} were read")
            return rows
        finally:
            path.write_bytes(variant.seed.data)


class _Refused(Exception):
    """`pack` ended with exit code 2 and one line."""


REFUSALS = (BadSample, ShardError, BrokenOutput, OutputMismatch, _Refused)


def _array(modality: Modality, variant: Variant) -> np.ndarray:
    decoded = modality.read(variant.file, variant.seed.extension)
    try:
        modality.check_preprocessed(decoded.array)
    except ValueError as error:
        raise Wrong(str(error)) from error
    if modality.size_of(decoded.array) != modality.processed_size(decoded.size):
        raise Wrong(f"an array of {decoded.array.shape} from {decoded.size}")
    largest = MAX_PIXELS * 3 if modality.name == "image" else MAX_SECONDS * 16_000 + 1
    if decoded.array.size > largest:
        raise Wrong(f"{decoded.array.size} numbers; allowed: {largest}")
    return decoded.array


def _checked(sample: Sample) -> tuple[str, dict[str, bytes]]:
    if sample.quarantine_reason:
        _helpful(sample.quarantine_reason)
        return sample.key, {"?": sample.quarantine_reason.encode()}
    if not sample.members:
        raise Wrong(f"the sample {sample.key!r} has no members")
    return sample.key, sample.members


# a message that begins with the class of an exception of Python is about a program, not about a file
WITHOUT_WORDS = re.compile(r"(^|: [A-Z\d]+: )[\W\d]*$|: $")  # empty, or a mere number after the name of a format
OF_THE_PROGRAM = re.compile(r"\w*(Error|Exception|Warning)\b")


def _helpful(message: str) -> str:
    """The message, if it says what is wrong in one line."""
    if OF_THE_PROGRAM.match(message) or WITHOUT_WORDS.search(message):
        raise Wrong(f"the message does not help: {message!r}")
    if message.startswith("not enough memory"):  # of a sample; a shard may claim to need any amount
        raise Wrong(f"memory beyond the limit: {message}")
    if len(message.splitlines()) > 1 or not message.isprintable():
        raise Wrong(f"the message is not one line of text: {message!r}")
    return message


def _equal(content: Any, other: Any) -> bool:
    return np.array_equal(content, other) if isinstance(content, np.ndarray) else content == other
