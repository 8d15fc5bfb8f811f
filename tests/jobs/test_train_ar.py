"""examples/train_ar.py: a small GPT on the tokens of pictures and of speech, from training to decoded samples."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image

from jobs.config import TokensConfig
from pipeline.corpus.shards import find_shards
from tests.corpus import tar_bytes
from tests.jobs.helpers import jpegs, save_tiny_tokenizer, tokenize_without_ray
from tokenizer.autoencoder import Autoencoder
from tokenizer.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/train_ar.py"
SEANET = {"name": "seanet", "width": 4, "decoder_width": 4, "strides": [6, 4, 4], "dilations": [1], "channels": 8}
SMALL = ["--dim", "32", "--layers", "2", "--heads", "2", "--samples", "4", "--window", "16", "--device", "cpu"]


def train(*args: str) -> str:
    done = subprocess.run([sys.executable, str(SCRIPT), *args, *SMALL], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_cached_steps_give_the_logits_of_the_whole_sequence():
    spec = importlib.util.spec_from_file_location("train_ar", SCRIPT)
    assert spec
    assert spec.loader
    train_ar = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_ar)
    torch.manual_seed(0)
    model = train_ar.GPT(50, 32, 2, 2).eval()
    tokens, positions = torch.randint(50, (3, 9)), torch.arange(9).expand(3, 9)
    with torch.inference_mode():
        whole = model(tokens, positions, torch.zeros_like(tokens))
        caches = [[] for _ in model.attention]
        steps = [model(tokens[:, i : i + 1], positions[:, i : i + 1], caches=caches) for i in range(9)]
        other = model(tokens, positions, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1]).expand(3, 9))
    assert torch.allclose(whole, torch.cat(steps, dim=1), atol=1e-5)
    assert torch.allclose(whole[:, :4], other[:, :4], atol=1e-5)
    assert not torch.allclose(whole[:, 4:], other[:, 4:], atol=1e-3)  # the second document does not see the first


def test_pictures_and_a_run_that_continues(tokenizer: str, tmp_path: Path):
    (tmp_path / "a.tar").write_bytes(tar_bytes(jpegs(24)))
    output = tokenize_without_ray(str(tmp_path / "a.tar"), tokenizer, tmp_path / "tokens")
    args = (output.url, tokenizer, "--out", str(tmp_path / "gpt"), "--block", "64", "--batch-size", "2")
    train(*args, "--steps", "2")
    first = json.loads((tmp_path / "gpt/result.json").read_text())
    printed = train(*args, "--steps", "5", "--heldout", output.url, "--save-samples", "3")
    assert "continues after step 2" in printed
    result = json.loads((tmp_path / "gpt/result.json").read_text())
    assert (first["steps"], result["steps"]) == (2, 5)
    assert (first["measured_on"], result["measured_on"]) == ("training, last 50 steps", "held out")
    assert result["tokenizer"] == Tokenizer.from_pretrained(tokenizer).id
    assert 0 < result["nats_per_token"] < 2 * np.log(Tokenizer.from_pretrained(tokenizer).codebook_size)
    samples = np.load(tmp_path / "gpt/samples.npy")
    assert (samples.dtype, samples.shape) == (np.uint8, (3, 40, 48, 3))
    for name in ("samples.png", "curve.png"):
        with Image.open(tmp_path / "gpt" / name) as drawn:
            assert len(np.unique(np.asarray(drawn.convert("RGB")).reshape(-1, 3), axis=0)) > 20


def test_speech(tmp_path: Path):
    torch.manual_seed(0)
    about = {"sample_rate": 16000}
    quantizer = {"name": "residual", "num_quantizers": 2, "base": {"name": "fsq", "codebook_size": 64}}
    autoencoder = Autoencoder({"modality": "audio", "net": SEANET, "quantizer": quantizer})
    Tokenizer(autoencoder, about).save_pretrained(tmp_path / "tokenizer")
    shards = find_shards(f"{ROOT}/samples/speech/heldout/*.tar").shards[:1]
    output = tokenize_without_ray(shards[0].url, str(tmp_path / "tokenizer"), tmp_path / "tokens")
    args = (output.url, str(tmp_path / "tokenizer"), "--out", str(tmp_path / "gpt"))
    train(*args, "--steps", "2", "--block", "128", "--length", "40")
    sound, rate = soundfile.read(tmp_path / "gpt/sample-0.wav")
    assert (len(sound), rate) == (20 * 96, 16000)  # 40 tokens, two for each frame of 96 samples


def test_another_tokenizer_is_refused(tokenizer: str, tmp_path: Path):
    (tmp_path / "a.tar").write_bytes(tar_bytes(jpegs(2)))
    output = tokenize_without_ray(str(tmp_path / "a.tar"), tokenizer, tmp_path / "tokens")
    other = save_tiny_tokenizer(tmp_path / "other", seed=1)
    command = [sys.executable, str(SCRIPT), output.url, other, "--out", str(tmp_path / "gpt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "was written by tokenizer" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_class_is_the_first_token(tokenizer: str, tmp_path: Path):
    members = [member for i, (name, data) in enumerate(jpegs(6)) for member in _with_class(name, data, i)]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    options = TokensConfig(passthrough=["cls"])
    output = tokenize_without_ray(str(tmp_path / "a.tar"), tokenizer, tmp_path / "tokens", options)
    printed = train(
        *(output.url, tokenizer, "--out", str(tmp_path / "gpt"), "--classes", "cls", "--steps", "1", "--block", "64")
    )
    assert "6 samples" in printed


def _with_class(name: str, data: bytes, number: int) -> list[tuple[str, bytes]]:
    return [(name, data), (f"{Path(name).stem}.cls", str(number % 3).encode())]
