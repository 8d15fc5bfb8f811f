"""scripts/gpu_experiments.py on the CPU, over a small Parquet file of real JPEGs, as on a machine without Ray."""

import importlib.util
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.compare import Planned, plan
from jobs.config import load_config
from tests.corpus import encoded, picture

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts/gpu_experiments.py"
SMALL = ("model.net.channels=8", "model.net.res_blocks=1", "compare.sizes=[16]")
LACKING = ("ray", "tensorboardX", "webdataset", "s3fs", "faiss")  # dependencies that a borrowed machine lacks
METHODS = ("VQ-VAE", "+ OPT", "GM-VQ")
# fails only after training: k-means makes its codebook, and here it gets no latents
BAD = ("compare.methods.bad.quantizer.name=vp_vae", "compare.max_latents=0")


def write_parquet(path: Path, jpegs: list[bytes]) -> str:
    keys, classes = [f"{i:05d}" for i in range(len(jpegs))], pa.array([0] * len(jpegs), pa.int8())
    pq.write_table(pa.table({"key": keys, "jpg": jpegs, "cls": classes}), path)
    return str(path)


def command(folder: Path, *more: str, methods: tuple[str, ...] = METHODS) -> list[str]:
    """The arguments of E1's rows at 60 steps over folder/cifar.parquet, with results in folder/out."""
    if not (folder / "cifar.parquet").exists():
        write_parquet(folder / "cifar.parquet", [encoded(picture(32, 32, seed=i), "jpeg") for i in range(120)])
    places = ["--data", f"{folder}/cifar.parquet", "--out", f"{folder}/out", "--device", "cpu"]
    rows = [part for method in methods for part in ("--only", method)]
    return [
        "e1",
        *places,
        *rows,
        "--length",
        "60",
        "--heldout",
        "20",
        "train.batch_size=8",
        "compare.seeds=[0]",
        *SMALL,
        *BAD,
        *more,
    ]


def start(folder: Path, arguments: list[str]) -> subprocess.Popen:
    """Runs the script in a separate process that cannot import the packages that a borrowed machine lacks."""
    for name in LACKING:
        (folder / "lacking" / name).mkdir(parents=True, exist_ok=True)
        (folder / "lacking" / name / "__init__.py").write_text("raise ImportError('not on a borrowed machine')\n")
    alone = {**os.environ, "PYTHONPATH": str(folder / "lacking"), "OMP_NUM_THREADS": "1"}
    code = (
        "import atexit, runpy, sys\n"
        f"atexit.register(lambda: print('ray' in sys.modules, file=open({str(folder / 'ray-imported')!r}, 'w')))\n"
        f"sys.argv = {[str(SCRIPT), *arguments]!r}\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], env=alone, stdout=subprocess.PIPE, text=True)


def trials(folder: Path) -> dict[str, int]:
    """Finished results: name to the time of writing."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "out/e1/trials").glob("*.json")}


@pytest.fixture(scope="module")
def script():
    """The script as a module of this process."""
    spec = importlib.util.spec_from_file_location("gpu_experiments", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A folder in which the script was killed after its first trial, then run again with two trials at a time."""
    folder = tmp_path_factory.mktemp("gpu")
    killed = start(folder, command(folder))
    while not trials(folder):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    before = trials(folder)
    assert len(before) < len(METHODS), "it was killed too late for this test"
    again = start(folder, command(folder, "--parallel", "2", methods=(*METHODS, "bad")))
    said, _ = again.communicate(timeout=240)
    (folder / "said.txt").write_text(said)
    assert again.returncode == 3, said  # since one trial fails
    assert f"{len(METHODS) + 1 - len(before)} of 13 trials to run" in said
    assert before.items() <= trials(folder).items()
    return folder


def test_a_killed_run_continues_with_what_is_missing_and_without_ray(done):
    results = [json.loads((done / "out/e1/trials" / name).read_text()) for name in trials(done)]
    assert sorted(result["label"] for result in results) == sorted(METHODS)
    assert all(result["history"][-1]["step"] == 60 and len(result["examples"]) == 12 for result in results)
    assert (done / "ray-imported").read_text() == "False\n"


def test_a_trial_that_fails_is_named_and_the_others_run(done):
    said = (done / "said.txt").read_text()
    assert "failed: e1 bad K=16 seed=0: ValueError: k-means needs at least one point" in said
    assert "trials left" not in said


def test_a_rerun_of_a_finished_run_only_makes_the_report(done, script, capsys):
    before = trials(done)
    (done / "out/e1/reports/compare.md").unlink()
    assert script.main(command(done)) == 0
    assert "0 of 13 trials to run" in capsys.readouterr().out
    assert trials(done) == before
    table = json.loads((done / "out/e1/reports/compare.json").read_text())["tables"]["heldout"]
    assert [row["method"] for row in table] == ["VQ-VAE", "+ OPT", "GM-VQ"]  # in the config's order
    assert all(row["num_samples"] == 20 and row["mse"] > 0 for row in table)
    text = (done / "out/e1/reports/compare.md").read_text()
    assert "Trained on cifar.parquet, the first 100 rows, evaluated on cifar.parquet, the last 20 rows" in text


def test_a_time_limit_ends_a_trial_that_has_begun_and_says_what_is_left(tmp_path, script, capsys):
    arguments = command(tmp_path, "--minutes", "0.1", "train.steps=100000", methods=("VQ-VAE", "GM-VQ"))
    assert script.main(arguments) == 3
    said = capsys.readouterr().out
    assert "trials left: 2; rerun the same command to continue. Next: e1 VQ-VAE K=16 seed=0; e1 GM-VQ" in said
    assert "no trial has a result yet" in said
    assert not trials(tmp_path)


def test_a_trial_starts_only_if_there_is_time_for_one_as_long_as_the_last(script):
    def fits(label: str) -> bool:
        one = Planned(label, 16, 0, trial=None, url="")
        return script._fits(script.Job("", one, "", "cpu", 1, time.time() + 60), took)

    took = {("short", 16): 10.0, ("long", 16): 90.0, ("short", 64): 20.0}
    assert [fits(label) for label in ("short", "long", "unknown")] == [True, False, True]
    assert not script._fits(script.Job("", Planned("new", 16, 0, None, ""), "", "cpu", 1, time.time() - 1), {})


def test_papers_length_is_100_epochs_and_gm_vq_has_its_own_learning_rate(script):
    config = load_config(script._files("e1", "paper"))
    config.compare.methods = {name: config.compare.methods[name] for name in ("VQ-VAE", "GM-VQ", "GM-VQ + entropy")}
    recipes = {one.label: one.trial.recipe for one in plan(config, "out", "corpus")}
    assert [recipe.lr for recipe in recipes.values()] == [1e-3, 1e-2, 1e-2]
    assert {round(r.steps * r.batch_size / 45_000, 2) for r in recipes.values()} == {100.0}
    assert {round(r.warmup_steps * r.batch_size / 45_000, 2) for r in recipes.values()} == {10.0}


def test_the_data_are_in_the_order_of_the_rows_and_known_by_their_content(tmp_path, script):
    jpegs = [encoded(picture(32, 32, seed=i), "jpeg") for i in range(6)]
    first, source = script.read_pictures(write_parquet(tmp_path / "a.parquet", jpegs), 2)
    assert np.array_equal(first["heldout"][1], np.asarray(Image.open(io.BytesIO(jpegs[5]))))
    assert (len(first["train"]), len(first["heldout"])) == (4, 2)
    assert script.read_pictures(write_parquet(tmp_path / "b.parquet", jpegs), 2)[1] == source
    assert script.read_pictures(str(tmp_path / "a.parquet"), 3)[1] != source
    assert script.read_pictures(write_parquet(tmp_path / "c.parquet", jpegs[::-1]), 2)[1] != source


@pytest.mark.parametrize(
    ("change", "printed"),
    [
        (["e4"], r"experiments are ['e1', 'e4']; give one or more of: e1, e2, e3"),
        (["--length", "long"], "--length is 'long'; it must be paper, quick, or a number of steps above 0"),
        (["--device", "gpu"], "invalid choice: 'gpu'"),
        (["--data", "nope.parquet"], "--data nope.parquet: there is no such file"),
        (["--data", str(SCRIPT)], "gpu_experiments.py: Could not open Parquet"),
        (["--only", "VQVAE"], "--only 'VQVAE': e1 has: VQ-VAE; VQ-VAE+ (l2)"),
        (["--heldout", "120"], "--heldout is 120; it must be 1 or more and below the 120 rows"),
        (["--parallel", "0"], "--parallel is 0"),
        (["train.step=5"], "unknown key train.step; did you mean train.steps?"),
        (["train.crop_size=30"], "train.crop_size is 30; it must be a multiple of the net's factor, 4"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, script, capsys, change: list[str], printed: str):
    assert script.main(command(tmp_path, *change)) == 2
    said = capsys.readouterr().err
    assert printed in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("jpegs", "printed"),
    [
        ([encoded(picture(32, 32), "jpeg"), b"no picture"], "row 1: not a picture that we can read"),
        ([encoded(picture(32, 32), "jpeg"), encoded(picture(16, 16), "jpeg")], "all pictures must have one size"),
    ],
)
def test_data_that_is_not_cifar_is_one_line(tmp_path, script, capsys, jpegs: list[bytes], printed: str):
    write_parquet(tmp_path / "cifar.parquet", jpegs)
    assert script.main([*command(tmp_path), "--heldout", "1"]) == 2
    assert printed in capsys.readouterr().err
