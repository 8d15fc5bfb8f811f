"""All commands on audio, through Ray: train, codebook, tokenize, verify, evaluate, decode; and bad input."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import yaml

from jobs.__main__ import main
from pipeline.corpus.samples import read_samples
from pipeline.tokens import Output
from tests.corpus import encoded, picture, write_tar
from tests.jobs.helpers import SAMPLES

pytestmark = pytest.mark.ray
NET = {"name": "seanet", "width": 4, "decoder_width": 4, "strides": [6, 4, 4], "dilations": [1], "channels": 8}
TONE = 0.3 * np.sin(np.arange(8000) / 10)


def wav(samples: np.ndarray, rate: int = 16_000, subtype: str = "PCM_16") -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format="WAV", subtype=subtype)
    return out.getvalue()


GOOD = {
    "tone": wav(TONE),
    "silence": wav(np.zeros(5000)),
    "dc": wav(np.full(5000, 0.5)),
    "20ms": wav(TONE[:320]),
    "8channels": wav(np.stack([TONE] * 8, axis=1)),
    "8khz": wav(TONE, rate=8000),
    "clipped": wav(3 * TONE, subtype="FLOAT"),
}
BAD = {
    "empty": b"",
    "zero-length": wav(np.zeros(0)),
    "truncated": wav(TONE)[:4000],
    "nan": wav(np.where(np.arange(8000) == 5, np.nan, TONE), subtype="FLOAT"),
    "picture": encoded(picture()),
}


@pytest.fixture(scope="module")
def road(ray_cluster, tmp_path_factory) -> Path:
    """A folder with a trained run, and the output of a corpus with good and bad clips."""
    folder = tmp_path_factory.mktemp("audio")
    members = [(f"{key}.wav", data) for key, data in {**GOOD, **BAD}.items()]
    write_tar(folder / "in/0.tar", members)
    settings = {
        "run": f"{folder}/run",
        "output": f"{folder}/out",
        "to": f"{folder}/decoded",
        "data": {"shards": f"{SAMPLES}/speech/heldout/*.tar"},
        "model": {"modality": "audio", "net": NET},
        "quantizer": {"name": "fsp", "codebook_size": 64},
        "train": {"steps": 3, "batch_size": 4, "crop_size": 4800, "log_every": 1},
        "tokens": {"max_bad_fraction": 0.9},
        "limit": 3,
        "workers": {"count": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", str(folder / "config.yaml")]) == 0
    assert main(["codebook", str(folder / "config.yaml")]) == 0
    assert main(["tokenize", str(folder / "config.yaml"), f"data.shards={folder}/in/*.tar"]) == 0
    return folder


def rows(road: Path) -> dict[str, dict]:
    output = Output.open(str(road / "out"))
    [entry] = output.commits()
    return {row["key"]: row for row in pq.read_table(output.tokens_url(entry.name)).to_pylist()}


def test_every_good_clip_has_a_row_and_every_bad_one_is_quarantined(road):
    [quarantine] = (road / "out/quarantine").iterdir()
    bad = {row["key"]: row for row in pq.read_table(quarantine).to_pylist()}
    assert set(rows(road)) == set(GOOD)
    assert set(bad) == set(BAD)
    assert "truncated" in bad["truncated"]["message"]
    assert "NaN" in bad["nan"]["message"]


def test_a_row_has_one_token_per_96_samples_and_the_size_of_the_original(road):
    found = rows(road)
    assert (found["tone"]["sample_rate"], found["tone"]["num_samples"], found["tone"]["shape"]) == (16_000, 8000, [84])
    assert (found["8khz"]["sample_rate"], found["8khz"]["num_samples"], found["8khz"]["shape"]) == (8000, 8000, [167])
    assert found["20ms"]["shape"] == [4]
    assert {row["modality"] for row in found.values()} == {"audio"}


def test_verify_finds_nothing(road, capsys):
    assert main(["verify", str(road / "config.yaml"), "verify.deep=true"]) == 0
    assert "5 quarantined" in capsys.readouterr().out


def test_decode_gives_back_exactly_the_samples(road):
    assert main(["decode", str(road / "config.yaml"), "decode.keys=[tone,8khz,20ms]"]) == 0
    lengths = {path.stem.rsplit("-", 1)[1]: soundfile.info(path).frames for path in (road / "decoded").glob("*.wav")}
    assert lengths == {"tone": 8000, "8khz": 16_000, "20ms": 320}


def test_evaluate_reports_quality_and_has_audio_players(road, capsys):
    assert main(["evaluate", str(road / "config.yaml")]) == 0
    [report] = (road / "run/reports").glob("evaluate-*.json")
    numbers = json.loads(report.read_text())
    assert numbers["num_samples"] == len(list(read_samples(f"{SAMPLES}/speech/heldout/speech-000.tar")))
    assert {"pesq", "stoi", "si_sdr", "mel_distance", "cvu", "kbps"} <= set(numbers)
    page = report.with_suffix(".html").read_text()
    clips = page.count('<figure class="clip')
    assert 3 <= clips <= 3 + 2 * 3  # the first ones, the best and the worst
    assert page.count("<audio controls") == page.count("data:audio/flac;base64") == 2 * clips
