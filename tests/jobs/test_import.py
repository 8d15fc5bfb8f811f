"""Published tokenizers through the whole chain: import, tokenize, verify, decode, read."""

import io
import json
import re
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.__main__ import main
from pipeline.tokens import TokenDataset
from tests.corpus import encoded, picture, tar_bytes
from tests.families import FAMILIES, save
from tests.hub import start_hub
from tests.jobs.helpers import SAMPLES, tokenize_without_ray
from tokenizer.adapters.base.model import read_model
from tokenizer.tokenizer import Tokenizer

SIDES = [(32, 16), (16, 16), (34, 18)]


def wav(num_samples: int, rate: int, seed: int) -> bytes:
    values = np.random.default_rng(seed).integers(-9000, 9000, num_samples, dtype=np.int16)
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(values.tobytes())
    return out.getvalue()


def write_corpus(folder: Path, modality: str, rate: int) -> str:
    if modality == "audio":
        members = [(f"{i}.wav", wav(480 + 7 * i, rate, i)) for i in range(3)]
    else:
        members = [(f"{i}.png", encoded(picture(*side, seed=i))) for i, side in enumerate(SIDES)]
    (folder / "corpus.tar").write_bytes(tar_bytes(members))
    return f"{folder}/corpus.tar"


@pytest.mark.parametrize("name", sorted(FAMILIES))
@torch.inference_mode()
def test_a_family_goes_the_whole_way(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The tokens that are read are the library's own, and verify and decode accept them."""
    model = save(name, tmp_path / "model")
    assert main(["import", f"{tmp_path}/model", f"run={tmp_path}/run"]) == 0
    folder = tmp_path / "run/tokenizers/model"
    tokenizer = Tokenizer.from_pretrained(folder)
    rate = tokenizer.preprocessing.get("sample_rate", 0)
    shards = write_corpus(tmp_path, FAMILIES[name].modality, rate)
    output = tokenize_without_ray(shards, str(folder), tmp_path / "out")
    rows = list(TokenDataset(output.url))
    assert [row["key"] for row in rows] == ["0", "1", "2"]
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(row["tokens"], FAMILIES[name].tokens(model, input_of(name, i, rate)))
    assert main(["verify", f"output={output.url}", "--deep"]) == 0
    capsys.readouterr()
    code = main(["decode", f"output={output.url}", f"tokenizer={folder}", f"decode.output={tmp_path}/decoded"])
    if FAMILIES[name].decoded is None:
        assert code == 2
        assert "this tokenizer only encodes: its library has no decoder of chameleon" in capsys.readouterr().err
    else:
        assert code == 0
        assert len(list((tmp_path / "decoded").iterdir())) == 3


def input_of(name: str, i: int, rate: int) -> torch.Tensor:
    """Sample i of write_corpus as the family's own processor makes it; pictures are filled up to whole tokens."""
    if FAMILIES[name].modality == "audio":
        with wave.open(io.BytesIO(wav(480 + 7 * i, rate, i))) as file:
            samples = np.frombuffer(file.readframes(10_000), np.int16)
        x = torch.from_numpy(samples / np.float32(32768))[None, None]
        return torch.nn.functional.pad(x, (0, -x.shape[-1] % FAMILIES[name].multiple))
    return torch.from_numpy(picture(*SIDES[i], seed=i)).permute(2, 0, 1)[None].float() / 255 * 2 - 1


@pytest.mark.ray
def test_photos_through_an_imported_model(ray_cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """From import to evaluate through Ray, on real photos."""
    save("vq_model", tmp_path / "vqgan")
    assert main(["import", str(tmp_path / "vqgan"), f"run={tmp_path}/run"]) == 0
    common = [f"run={tmp_path}/run", f"data.shards={SAMPLES}/heldout/photos-000.tar"]
    assert main(["tokenize", *common, f"output={tmp_path}/out"]) == 0
    assert main(["tokenize", *common, f"output={tmp_path}/out"]) == 0
    assert main(["verify", f"output={tmp_path}/out", "--deep"]) == 0
    assert main(["audit", f"output={tmp_path}/out", "audit.rows=5"]) == 0
    assert main(["evaluate", *common]) == 0
    report = json.loads((tmp_path / "run/reports/evaluate-vqgan.json").read_text())
    assert report["num_samples"] == len(TokenDataset(f"{tmp_path}/out")) > 10
    assert "1 done before" in capsys.readouterr().out


# -- sources ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the models on a server: org/model holds one in the folder vqvae, and code and a pickle."""
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    save("vq_model", tmp_path / "hub/org/model/vqvae")
    (tmp_path / "hub/org/model/modeling_evil.py").write_text("raise SystemExit('ran')")
    (tmp_path / "hub/org/model/vqvae/pytorch_model.bin").write_bytes(b"pickle")
    return tmp_path / "hub"


def test_a_model_of_the_hub_is_downloaded_without_its_code(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with start_hub(hub) as (address, asked):
        monkeypatch.setenv("HF_ENDPOINT", address)
        place = ["pretrained.subfolder=vqvae", "pretrained.revision=v1", f"run={tmp_path}/run"]
        assert main(["import", "hf:org/model", *place]) == 0
    assert "downloading org/model at revision v1" in capsys.readouterr().out
    imported = Tokenizer.from_pretrained(tmp_path / "run/tokenizers/model")
    assert imported.id == read_model(hub / "org/model/vqvae").freeze().id
    fetched = [path for path in asked if "/resolve/" in path]
    assert fetched
    assert not [path for path in fetched if path.endswith((".py", ".bin"))]


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        ("hf:org/none", "", r"hf:org/none cannot be downloaded"),
        ("hf:org/model", "v9", r"hf:org/model cannot be downloaded"),
        ("hf:a b", "", r"hf:a b cannot be downloaded"),
        ("hf:org/model", "", r"no model: .*config.json"),
    ],
)
def test_what_the_hub_does_not_have_is_named(
    hub: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: str,
    revision: str,
    message: str,
):
    with start_hub(hub) as (address, _):
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert main(["import", source, f"pretrained.revision={revision}", f"run={tmp_path}/run"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_gated_model_needs_the_token_and_no_message_has_it(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    arguments = ["import", "hf:org/model", "pretrained.subfolder=vqvae", f"run={tmp_path}/run"]
    with start_hub(hub, token="hf_secret") as (address, _):
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        assert main(arguments) == 2
        refused = capsys.readouterr()
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        assert main(arguments) == 0
    done = capsys.readouterr()
    assert "set HF_TOKEN for a private or gated model" in refused.err
    assert "hf_wrong" not in refused.err + refused.out
    assert "hf_secret" not in done.err + done.out


def test_an_import_again_changes_nothing_and_another_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    save("dac", tmp_path / "model")
    arguments = ["import", f"{tmp_path}/model", f"run={tmp_path}/run"]
    assert main(arguments) == 0
    before = (tmp_path / "run/tokenizers/model/tokenizer.json").read_bytes()
    assert main(arguments) == 0
    assert "already exists" in capsys.readouterr().out
    assert main([*arguments, "pretrained.num_quantizers=2"]) == 2
    assert "choose another pretrained.name, or delete the folder" in capsys.readouterr().err
    assert (tmp_path / "run/tokenizers/model/tokenizer.json").read_bytes() == before
    assert main([*arguments, "pretrained.num_quantizers=2", "pretrained.name=dac-2"]) == 0
    assert Tokenizer.from_pretrained(tmp_path / "run/tokenizers/dac-2").autoencoder.quantizer.num_quantizers == 2


def test_a_folder_without_a_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["import", f"{tmp_path}/none", f"run={tmp_path}/run"]) == 2
    assert f"pretrained.source is {tmp_path}/none, which is no model" in capsys.readouterr().err


def test_an_import_needs_a_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["import", f"run={tmp_path}/run"]) == 2
    assert "pretrained.source is not set" in capsys.readouterr().err
