"""scripts/codec_ceiling.py and scripts/mel_weight.py on a tiny net and real speech, as on a machine without Ray."""

import importlib.util
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from jobs.config import load_config
from pipeline.corpus.samples import read_samples
from tests.corpus import write_tar
from tokenizer.autoencoder import Autoencoder
from tokenizer.modalities.base import build_modality
from tokenizer.quantizers.base.quantizer import QUANTIZERS
from tokenizer.tokenizer import Tokenizer
from tokenizer.training.recipe import Recipe
from tokenizer.training.trial import Trial, run_trial

ROOT = Path(__file__).parent.parent
NET = {"name": "seanet", "width": 2, "decoder_width": 2, "strides": [6, 4, 4], "dilations": [1], "channels": 8}
MODEL = {"modality": "audio", "net": NET}
RECIPE = Recipe(steps=3, batch_size=2, segment=2400, warmup_steps=1)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ceiling() -> ModuleType:
    return script("codec_ceiling")


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tars of four clips each."""
    folder = tmp_path_factory.mktemp("speech")
    for part in ("train", "heldout"):
        some = islice(read_samples(str(ROOT / f"samples/speech/{part}/speech-000.tar")), 4)
        write_tar(folder / f"{part}.tar", [(f"{s.key}.g722", s.members["g722"]) for s in some])
    return folder


def settings(speech: Path, *more: str) -> list[str]:
    """E4 at tiny scale, on those clips."""
    net = [f"model.net.{key}={value}" for key, value in NET.items()]
    shards = [f"data.shards={speech}/train.tar", f"compare.heldout={speech}/heldout.tar", "metrics={slow: false}"]
    recipe = ["train.steps=2", "train.warmup_steps=1", "train.batch_size=2", "train.crop_size=2400"]
    return [
        "configs/compare/e4_speech.yaml",
        *net,
        *shards,
        f"compare.others.french={speech}/heldout.tar",
        *recipe,
        *more,
    ]


def run(name: str, *arguments: str) -> str:
    """Runs the script where importing ray fails. Returns its output."""
    code = "import sys, runpy; sys.modules['ray'] = None; sys.path[:0] = ['scripts', '.']; sys.argv = sys.argv[1:]\n"
    code += f"runpy.run_path('scripts/{name}.py', run_name='__main__')"
    command = [sys.executable, "-c", code, name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_width_is_trained_once_and_again_only_where_the_settings_change(speech: Path, tmp_path: Path):
    out = str(tmp_path / "ceiling")
    assert "latents of 3 channels" in run("codec_ceiling", *settings(speech), "--out", out, "--dims", "3")
    more = run("codec_ceiling", *settings(speech), "--out", out, "--dims", "3,8")
    assert "latents of 3 channels" not in more
    assert "latents of 8 channels" in more
    rows = [line for line in (tmp_path / "ceiling.md").read_text().splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| channels", "| ---", "| 3", "| 8"]
    assert "latents of 3 channels" in run(
        "codec_ceiling", *settings(speech, "train.lr=0.1"), "--out", out, "--dims", "3"
    )


def test_other_weights_stand_beside_what_was_there_before(speech: Path, tmp_path: Path):
    run("codec_ceiling", *settings(speech), "--out", str(tmp_path / "ceiling"), "--dims", "3")
    (tmp_path / "compare.json").write_text('{"tables": {"heldout": [{"method": "FSP", "K": 256, "mse": 0.25}]}}')
    before = ["--before", str(tmp_path / "compare.json"), "--before-none", str(tmp_path / "ceiling.json")]
    chosen = ["--methods", "none,FSP", "--size", "256", "--name", "mel 0", *before]
    run("mel_weight", *settings(speech, "train.loss_weights.mel=0"), "--out", str(tmp_path / "mel"), *chosen)
    rows = [line.split(" | ")[:2] for line in (tmp_path / "mel.md").read_text().splitlines() if line.startswith("| ")]
    assert rows[2:] == [["| none", "before"], ["| none", "mel 0"], ["| FSP", "before"], ["| FSP", "mel 0"]]
    found = json.loads((tmp_path / "mel.json").read_text())["none, mel 0"]
    ceiling = json.loads((tmp_path / "ceiling.json").read_text())["dim 3"]
    assert found["numbers"] != ceiling["numbers"]["heldout"]
    assert found["gradient_norm"] == sorted(found["gradient_norm"])


def test_with_the_same_weights_the_net_without_a_quantizer_is_that_of_the_ceiling(speech: Path, tmp_path: Path):
    run("codec_ceiling", *settings(speech), "--out", str(tmp_path / "ceiling"), "--dims", "3")
    chosen = ["--methods", "none", "--size", "256", "--name", "same"]
    run("mel_weight", *settings(speech), "--out", str(tmp_path / "mel"), *chosen)
    found = json.loads((tmp_path / "mel.json").read_text())["none, same"]["numbers"]
    assert found == json.loads((tmp_path / "ceiling.json").read_text())["dim 3"]["numbers"]["heldout"]


def test_nothing_comes_between_the_projections(ceiling: ModuleType):
    made, x = ceiling.unquantized(MODEL, 3), torch.randn(2, 1, 960)
    expected = made.net.decode(made.project_out(made.project_in(made.net.encode(x).movedim(1, -1))).movedim(-1, 1))
    for training in (True, False):
        assert torch.equal(made.train(training)(x).x_hat, expected)
    assert made.project_in.out_features == 3


def test_it_trains_as_a_trial_whose_quantizer_hands_latents_on(ceiling: ModuleType, speech: Path):
    """VP-VAE passes latents on while its queue fills. With zero weight on its losses, it is the reference."""
    modality = build_modality("audio", {})
    arrays = ceiling.samples(f"{speech}/train.tar", modality)
    quantizer = {"name": "vp_vae", "codebook_size": 64, "dim": 3}
    recipe = Recipe(**{**vars(RECIPE), "loss_weights": {"norm_mean": 0.0, "norm_var": 0.0}})
    trial = Trial({**MODEL, "quantizer": quantizer}, recipe, metrics={"slow": False}, num_examples=0)
    expected = run_trial(trial, arrays, arrays[:1]).history
    _, found = ceiling.train(MODEL, 3, RECIPE, modality, arrays)
    assert [row["mel"] for row in found] == [row["mel"] for row in expected]
    assert len({row["mel"] for row in found}) == 3


def test_quality_is_that_of_the_net_and_leaves_out_what_is_not_defined(ceiling: ModuleType, speech: Path):
    modality = build_modality("audio", {})
    config = load_config(["model.modality=audio", "metrics={slow: false}"])
    clip = ceiling.samples(f"{speech}/heldout.tar", modality)[0]
    silence = np.zeros((4800, 1), dtype=np.float32)  # has no SI-SDR
    made = ceiling.unquantized(MODEL, 3).eval()
    found = [ceiling.measure(made, modality, config, arrays) for arrays in ([clip], [silence], [clip, silence])]
    padded = torch.nn.functional.pad(torch.from_numpy(clip.T), (0, -len(clip) % 96))[None]
    error = (made(padded).x_hat[0, 0, : len(clip)].clamp(-1, 1) - padded[0, 0, : len(clip)]).square().mean()
    assert found[0]["mse"] == pytest.approx(error.item(), rel=1e-4)
    assert found[2]["mse"] == pytest.approx((found[0]["mse"] + found[1]["mse"]) / 2)
    assert found[2]["si_sdr"] == found[0]["si_sdr"]


def test_no_config_and_no_tokenizer_can_have_it(ceiling: ModuleType):
    assert not any(issubclass(QUANTIZERS.get(name), ceiling.Unquantized) for name in QUANTIZERS.names())
    with pytest.raises(AttributeError, match="codebook_size"):
        Tokenizer(ceiling.unquantized(MODEL, 3), {})


def test_the_net_starts_as_in_the_trials_of_a_comparison(ceiling: ModuleType):
    torch.manual_seed(0)
    made = ceiling.unquantized(MODEL, 4)
    for quantizer in ({"name": "fsq", "codebook_size": 64}, {"name": "vq_vae", "dim": 4}):
        torch.manual_seed(0)
        trial = Autoencoder({**MODEL, "quantizer": quantizer}).net.state_dict()
        assert all(torch.equal(value, trial[name]) for name, value in made.net.state_dict().items())
