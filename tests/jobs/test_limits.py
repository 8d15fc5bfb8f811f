"""Limits on samples that are no part of the tokenizer, samples that do not fit into memory, and notes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image as PIL

from jobs.__main__ import main
from jobs.artifacts import check_limits, with_rules_of_run
from jobs.config import ConfigError, TokensConfig, load_config
from jobs.shards import DecodedSample, apply_or_quarantine, decode_sample
from jobs.train import _claim
from pipeline.corpus.samples import Sample
from pipeline.tokens import Output, Quarantined
from tests.corpus import encoded, picture, tar_bytes
from tests.jobs.helpers import jpegs, rows_of, tokenize_without_ray
from tokenizer.modalities.base import Decoded, build_modality
from tokenizer.modalities.image.modality import Image, ImageConfig
from tokenizer.tokenizer import Tokenizer

LARGE = ("large.png", encoded(picture(100, 100)))


def quarantined(output: Output) -> dict[str, tuple[str, str]]:
    """Key -> stage and message."""
    samples = [sample for entry in output.commits() for sample in output.quarantined(entry)]
    return {sample.key: (sample.stage, sample.message) for sample in samples}


@pytest.fixture
def shard(tmp_path: Path) -> str:
    """Two small pictures with captions, and a large one."""
    (tmp_path / "a.tar").write_bytes(tar_bytes([*jpegs(2), ("0001.txt", b"x" * 50_000), LARGE]))
    return str(tmp_path / "a.tar")


# -- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        ({}, {}),
        ({"max_pixels": 5000}, {"large": "100x100: more pixels than max_pixels=5000"}),
        ({"max_sample_bytes": 45_000}, {"0001": "more than tokens.max_sample_bytes=45000"}),
    ],
)
def test_a_sample_beyond_a_limit_is_quarantined(
    shard: str, tokenizer: str, tmp_path: Path, options: dict[str, int], reasons: dict[str, str]
):
    output = tokenize_without_ray(shard, tokenizer, tmp_path / "out", TokensConfig(**options))
    found = quarantined(output)
    assert {key: stage for key, (stage, _) in found.items()} == dict.fromkeys(reasons, "decode")
    assert all(reason in found[key][1] for key, reason in reasons.items())
    assert output.layout.tokenizer_id == Tokenizer.from_pretrained(tokenizer).id


def test_a_limit_may_be_above_that_of_the_tokenizer():
    modality = Image(ImageConfig(max_pixels=1000))
    sample = Sample(0, "large", {"png": LARGE[1]})
    assert isinstance(decode_sample(sample, modality), Quarantined)
    assert isinstance(decode_sample(sample, modality.with_limits({"max_pixels": 10_000})), DecodedSample)


def test_a_clip_beyond_max_seconds_is_quarantined():
    audio = build_modality("audio", {"sample_rate": 8000})
    sample = Sample(0, "clip", {"wav": audio.to_bytes(np.zeros((16_000, 1), np.float32))})
    assert isinstance(decode_sample(sample, audio), DecodedSample)
    outcome = decode_sample(sample, audio.with_limits(TokensConfig(max_seconds=1.5).limits()))
    assert isinstance(outcome, Quarantined)
    assert "1.5" in outcome.message


def test_a_limit_of_another_modality_is_a_mistake_in_the_configuration():
    with pytest.raises(ConfigError, match=r"tokens\.max_seconds is no limit of image samples; leave it out"):
        check_limits(Image(ImageConfig()), TokensConfig(max_seconds=3))


@pytest.mark.parametrize("key", ["max_pixels", "max_seconds", "max_sample_bytes"])
def test_a_negative_limit_is_refused(key: str):
    with pytest.raises(ConfigError, match=rf"tokens\.{key} is -1"):
        load_config([f"tokens.{key}=-1"])


def test_the_wrong_limit_ends_the_command_with_2(
    shard: str, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    given = [f"tokenizer={tokenizer}", f"data.shards={shard}", f"output={tmp_path}/out", "tokens.max_seconds=3"]
    assert main(["tokenize", *given]) == 2
    assert "tokens.max_seconds is no limit of image samples" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- out of memory ----------------------------------------------------------------------------------------------------


def decoded(index: int, side: int) -> DecodedSample:
    return DecodedSample(Sample(index, f"k{index}"), Decoded(np.full((side, side, 3), index, np.uint8), {}))


class Encoder:
    """Allocates more memory than any machine has if a batch has more than `most` pixels."""

    def __init__(self, most: int, library: str):
        self.most, self.library = most, library
        self.sizes: list[int] = []

    def __call__(self, batch: list[DecodedSample]) -> list[int]:
        self.sizes.append(len(batch))
        if sum(one.decoded.array.shape[0] ** 2 for one in batch) > self.most:
            torch.empty(2**60, dtype=torch.uint8) if self.library == "torch" else np.empty(2**60, np.uint8)
        return [int(one.decoded.array[0, 0, 0]) for one in batch]


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_a_batch_that_does_not_fit_is_split(library: str):
    encoder, bad = Encoder(250, library), []
    pairs = apply_or_quarantine(encoder, [decoded(i, 10) for i in range(5)], bad)
    assert [(one.sample.index, value) for one, value in pairs] == [(i, i) for i in range(5)]
    assert encoder.sizes == [5, 3, 2, 1, 2]
    assert bad == []


@pytest.mark.parametrize(("library", "error"), [("torch", "RuntimeError"), ("numpy", "MemoryError")])
def test_only_the_sample_that_does_not_fit_alone_is_quarantined(library: str, error: str):
    bad: list[Quarantined] = []
    batch = [decoded(0, 10), decoded(1, 100), decoded(2, 10)]
    assert [value for _, value in apply_or_quarantine(Encoder(250, library), batch, bad)] == [0, 2]
    assert [(one.key, one.stage, one.error) for one in bad] == [("k1", "encode", error)]
    assert "not enough memory to encode it" in bad[0].message


def test_another_error_still_fails_the_shard():
    with pytest.raises(RuntimeError, match="size of tensor"):
        apply_or_quarantine(lambda _: [int(torch.ones(2) + torch.ones(3))], [decoded(0, 8)], [])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_full_gpu_quarantines_the_sample_too():
    def encode(batch: list[DecodedSample]) -> list[int]:
        torch.empty(2**50 if len(batch[0].decoded.array) > 50 else 8, dtype=torch.uint8, device="cuda")
        return [one.sample.index for one in batch]

    bad: list[Quarantined] = []
    assert [value for _, value in apply_or_quarantine(encode, [decoded(0, 10), decoded(1, 100)], bad)] == [0]
    assert [(one.key, one.error) for one in bad] == [("k1", "OutOfMemoryError")]


IN_LITTLE_MEMORY = """
import pathlib, re, resource, sys
import torch
from jobs.config import TokensConfig
from tests.jobs.helpers import tokenize_without_ray
torch.set_num_threads(1)
small, shard, tokenizer, output = sys.argv[1:]
options = TokensConfig(decode_threads=1, max_pixels=10**9)
tokenize_without_ray(small, tokenizer, output, options)  # loads every library before memory is short
used = int(re.search(r"VmSize:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 600 * 2**20,) * 2)
tokenize_without_ray([small, shard], tokenizer, output, options)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
def test_a_picture_that_does_not_fit_into_memory_costs_only_itself(tokenizer: str, tmp_path: Path):
    """In 600 MB. 12,000 x 12,000 pixels need 432 MB as RGB; the floats of 4000 x 4000 pixels need 192 MB a layer."""
    black = {side: encoded(PIL.new("RGB", (side, side)), compress_level=1) for side in (4000, 12_000)}
    members = [*jpegs(2), ("decode.png", black[12_000]), ("encode.png", black[4000]), ("last.png", encoded(picture()))]
    (tmp_path / "a.tar").write_bytes(tar_bytes(jpegs(1)))
    (tmp_path / "b.tar").write_bytes(tar_bytes(members))
    given = [str(tmp_path / "a.tar"), str(tmp_path / "b.tar"), tokenizer, str(tmp_path / "out")]
    ran = subprocess.run([sys.executable, "-c", IN_LITTLE_MEMORY, *given], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert rows_of(tmp_path / "out")["key"].to_pylist() == ["0000", "0000", "0001", "last"]
    found = quarantined(Output.open(str(tmp_path / "out")))
    assert {key: stage for key, (stage, _) in found.items()} == {"decode": "decode", "encode": "encode"}
    assert all(f"not enough memory to {stage} it" in message for stage, message in found.values())


# -- notes ------------------------------------------------------------------------------------------------------------

FIRST_ONLY = "several frames or pages, only the first used"


def test_pictures_of_several_frames_are_counted(tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    frames = [picture(seed=seed) for seed in range(3)]
    first, *more = frames
    options = {"save_all": True, "append_images": [PIL.fromarray(frame) for frame in more]}
    animated = [(f"a{i}.webp", encoded(first, "webp", lossless=True, **options)) for i in range(2)]
    (tmp_path / "a.tar").write_bytes(tar_bytes([*jpegs(2), *animated]))
    output = tokenize_without_ray(str(tmp_path / "a.tar"), tokenizer, tmp_path / "out")
    [entry] = output.commits()
    assert entry.notes == {f"samples: {FIRST_ONLY}": 2}
    assert main(["status", f"output={tmp_path}/out"]) == 0
    assert f"2 samples: {FIRST_ONLY}" in capsys.readouterr().out
    assert main(["tokenize", f"tokenizer={tokenizer}", f"data.shards={tmp_path}/a.tar", f"output={tmp_path}/out"]) == 0
    assert f"tokenize: 2 samples: {FIRST_ONLY}" in capsys.readouterr().out


# -- runs of earlier versions -----------------------------------------------------------------------------------------


def test_a_run_from_before_the_color_rules_keeps_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = load_config(["demo"])
    assert config.data.preprocess["color_rules"] == 2
    _claim(str(tmp_path), config)
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert stored["data"]["preprocess"]["color_rules"] == 2
    assert with_rules_of_run(config, str(tmp_path), "train") == config
    del stored["data"]["preprocess"]["color_rules"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored))
    kept, _ = _claim(str(tmp_path), config)
    assert kept.data.preprocess == {**config.data.preprocess, "color_rules": 1}
    assert "earlier version and keeps data.preprocess.color_rules=1" in capsys.readouterr().out
