"""What must not change while the code is reorganised, checked with artifacts that an older version made.

- A frozen tokenizer loads under the same tokenizer, codebook and encoder id, and is saved again as the same bytes.
- The same samples give the same tokens, from pixels and from cached latents; tokens decode to the same samples.
- The same shards have the same names and the same manifest id.
- An old output passes `verify`, plain and deep. `tokenize` resumes an output that is half done, also where a job died
  between tokens and commit. `audit` makes its rows again.
- A new output has the same files, JSON keys, columns and footers (num_samples is wider); a retry has the same name and
  entry.
- Quantizers, nets and modalities have the same fields and defaults, since these are hashed into ids.
- A run's config.yaml loads and its training resumes with the same losses. A new training with the same seed has the
  same losses, and checkpoints hold the same names. The codebook made from cached latents is the same.
- A seed gives the same order of training samples, of reading and of packing, the same reservoir sample, audit rows and
  crop.
- Commands, configuration keys and exit codes stay the same.

New files, keys, columns, commands and methods are allowed. Nothing here may be removed, or change its name or value.

The expected values are the artifacts and expected.json; make.py says how they are made and when they may be made again.
Tokens are compared exactly: make.py accepts only samples whose tokens stay the same when latents move by 1e-4 of their
spread, a hundred times the rounding difference of another processor. Latents and losses have a stated tolerance.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from tests.golden import names
from tests.golden.names import GOLDEN, HOME, PHOTOS, RUN_TOKENIZER, SOUND, command

EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
TOKENIZERS = sorted(EXPECTED["tokenizers"])
COMMANDS = (
    *("pack", "train", "codebook", "tokenize", "status", "verify"),
    *("audit", "retry", "decode", "compare", "evaluate"),
)
OUTPUTS = {"out": RUN_TOKENIZER, "out_audio": "tokenizers/sound"}
TRAIN = ("workers.count=1", "workers.cpus=1")  # one thread, as when the run was made


@pytest.fixture(scope="module", autouse=True)
def corpus() -> Iterator[None]:
    """The shards at their fixed path, and one thread, because the last bit of a sum depends on the number."""
    names.place_corpus()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the trained run."""
    return shutil.copytree(GOLDEN / "run", tmp_path / "run")


@pytest.fixture
def half_done(tmp_path: Path) -> Path:
    """The output of a job that was killed after two of four shards, with uncommitted tokens of a third."""
    output = shutil.copytree(GOLDEN / "out", tmp_path / "out")
    for file in [*output.glob("manifest/photos-00[23]*"), *output.glob("*/photos-003*")]:
        file.unlink(missing_ok=True)
    assert len(list(output.glob("tokens/photos-002*"))) == 1
    return output


def files_below(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


# -- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", TOKENIZERS)
def test_a_tokenizer_loads_under_its_ids(folder: str):
    expected = EXPECTED["tokenizers"][folder]
    assert names.ids_of(names.load(GOLDEN / folder)).items() <= expected.items()


@pytest.mark.parametrize("folder", TOKENIZERS)
def test_a_loaded_tokenizer_is_saved_as_the_same_bytes(folder: str, tmp_path: Path):
    names.load(GOLDEN / folder).save_pretrained(tmp_path)
    for file in (GOLDEN / folder).iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("folder", TOKENIZERS)
def test_samples_give_the_same_tokens(folder: str):
    found = names.tokens_of(names.load(GOLDEN / folder))
    for key, sample in EXPECTED["tokenizers"][folder]["samples"].items():
        assert list(found[key].shape) == sample["shape"]
        assert " ".join(map(str, found[key].ravel())) == sample["tokens"]


def test_a_trained_model_is_saved_as_the_same_bytes(tmp_path: Path):
    names.load_model(GOLDEN / "run/model").save(tmp_path)
    for file in (GOLDEN / "run/model").iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("kind", EXPECTED["configs"])
def test_fields_and_defaults_of_configs_stay(kind: str):
    found = names.config_defaults()[kind]
    for name, fields in EXPECTED["configs"][kind].items():
        assert found[name] == fields, name


# -- outputs ----------------------------------------------------------------------------------------------------------


def test_shards_have_the_same_names_and_manifest_id():
    assert {shard.url: shard.name for shard in names.shards_of(PHOTOS)} == EXPECTED["shards"]
    assert names.manifest_id(PHOTOS) == EXPECTED["input_manifest_id"]


@pytest.mark.parametrize("deep", ["verify.deep=false", "verify.deep=true"])
@pytest.mark.parametrize("output", [*OUTPUTS, "run/latents"])
def test_verify_accepts_an_old_output(output: str, deep: str):
    assert command("verify", f"output={GOLDEN / output}", deep) == 0


def test_a_half_done_output_is_resumed(half_done: Path):
    committed = [file for file in files_below(half_done) if "photos-002" not in file]  # that one may be made anew
    before = {file: (half_done / file).read_bytes() for file in committed}
    names.tokenize_here(PHOTOS, GOLDEN / RUN_TOKENIZER, half_done, passthrough=["txt"])
    assert names.rows_of(half_done).equals(names.rows_of(GOLDEN / "out"))
    assert files_below(half_done) == files_below(GOLDEN / "out")
    assert all((half_done / file).read_bytes() == data for file, data in before.items())
    assert command("verify", f"output={half_done}", "verify.deep=true") == 0


@pytest.fixture(scope="module")
def new_outputs(corpus: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs, made again with the same steps as in make.py."""
    folder = tmp_path_factory.mktemp("new")
    given: dict[str, Any] = {"tokenizer": GOLDEN / RUN_TOKENIZER, "output": folder / "out", "passthrough": ["txt"]}
    names.tokenize_here(f"{HOME}/in/photos-000.tar", **given)
    names.tokenize_then_retry(f"{HOME}/in/photos-001.tar", **given)
    names.tokenize_here(PHOTOS, **given)
    names.tokenize_here(SOUND, GOLDEN / "tokenizers/sound", folder / "out_audio", encoding="packed")
    return folder


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_new_output_has_the_same_rows(new_outputs: Path, name: str):
    assert names.rows_of(new_outputs / name).equals(names.wide(names.rows_of(GOLDEN / name)))


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_new_output_has_the_same_files_and_keys(new_outputs: Path, name: str):
    found = names.json_names(new_outputs / name)
    assert files_below(new_outputs / name) >= files_below(GOLDEN / name)
    for file, keys in names.json_names(GOLDEN / name).items():
        known = {key for key in keys if not key.startswith("config.")}  # the configuration of the command that made it
        assert found[file] >= known, file


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_new_output_has_the_same_columns_and_footers(new_outputs: Path, name: str):
    found = names.parquet_layout(new_outputs / name)
    for file, layout in names.parquet_layout(GOLDEN / name).items():
        wide = {"num_samples": ["int64", True]} if "num_samples" in layout["columns"] else {}
        assert found[file]["columns"].items() >= (layout["columns"] | wide).items(), file
        assert found[file]["footer"].items() >= layout["footer"].items(), file


def test_the_same_samples_are_in_quarantine(new_outputs: Path):
    files = sorted((GOLDEN / "out/quarantine").iterdir())
    assert len(files) == 3
    for file in files:
        new, old = (names.read_quarantine(one) for one in (new_outputs / "out/quarantine" / file.name, file))
        assert new.equals(old), file.name


def test_cached_latents_give_the_same_tokens(tmp_path: Path):
    options = {"passthrough": ["txt"], "latents": str(GOLDEN / "run/latents")}
    names.tokenize_here(PHOTOS, GOLDEN / RUN_TOKENIZER, tmp_path, **options)
    assert names.rows_of(tmp_path).equals(names.wide(names.rows_of(GOLDEN / "out")))


def test_pixels_give_the_cached_latents():
    rows = names.rows_of(GOLDEN / "run/latents").to_pylist()
    cached = {row["key"]: np.frombuffer(row["tokens"], "<f4").reshape(row["shape"]) for row in rows}
    for key, latents in names.latents_of(names.load(GOLDEN / RUN_TOKENIZER), count=100).items():
        np.testing.assert_allclose(latents, cached.pop(key), rtol=1e-4, atol=1e-5, err_msg=key)
    assert not cached


@pytest.mark.parametrize("name", OUTPUTS)
def test_old_tokens_decode_to_the_same_samples(name: str, tmp_path: Path):
    tokenizer = f"tokenizer={GOLDEN / OUTPUTS[name]}"
    assert command("decode", f"output={GOLDEN / name}", tokenizer, f"decode.output={tmp_path}", "decode.limit=2") == 0
    assert files_below(tmp_path) == files_below(GOLDEN / "decoded" / name)
    for file in files_below(tmp_path):
        new, old = samples_in(tmp_path / file), samples_in(GOLDEN / "decoded" / name / file)
        assert new.shape == old.shape
        assert np.abs(new - old).max() <= 1  # of 255 levels, or of 32768


def samples_in(file: Path) -> np.ndarray:
    if file.suffix == ".wav":
        return 32768 * soundfile.read(file)[0]
    return np.asarray(Image.open(file)).astype(float)


def test_status_tells_the_same_names(capsys: pytest.CaptureFixture[str]):
    assert command("status", f"output={GOLDEN / 'out'}", "status.json=true") == 0
    found = json.loads(capsys.readouterr().out)
    assert names.names_in(found) >= set(EXPECTED["status_names"])
    assert (found["samples"], found["tokens"], found["quarantined"]) == (15, 356, 2)


# -- what a seed determines, and the command line --------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeds(corpus: None) -> dict[str, Any]:
    return names.seed_recipes()


@pytest.mark.parametrize("recipe", EXPECTED["seeds"])
def test_a_seed_draws_the_same(seeds: dict[str, Any], recipe: str):
    assert seeds[recipe] == EXPECTED["seeds"][recipe]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_there(name: str):
    assert command(name, "--help") == 0


def test_every_configuration_key_is_still_accepted():
    names.accepts(GOLDEN / "keys.yaml")


def test_a_mistake_exits_with_2():
    assert command("verify", "outptu=nowhere") == 2
    assert command("verify", "output=nowhere") == 2
    assert command("verfiy") == 2


def test_an_incomplete_output_exits_with_3(half_done: Path):
    assert command("verify", f"output={half_done}") == 3


@pytest.mark.parametrize(("fraction", "code"), [("0.5", 0), ("0.01", 4)])
def test_too_many_bad_samples_exit_with_4(tmp_path: Path, fraction: str, code: int):
    output = shutil.copytree(GOLDEN / "out", tmp_path / "out")
    given = [f"data.shards={PHOTOS}", f"tokenizer={GOLDEN / RUN_TOKENIZER}", f"output={output}"]
    assert command("tokenize", *given, "tokens.passthrough=[txt]", f"tokens.max_bad_fraction={fraction}") == code


def test_another_tokenizer_on_an_old_output_exits_with_2(tmp_path: Path):
    output = shutil.copytree(GOLDEN / "out", tmp_path / "out")
    given = [f"data.shards={PHOTOS}", f"tokenizer={GOLDEN}/tokenizers/fsp", f"output={output}"]
    assert command("tokenize", *given, "tokens.passthrough=[txt]") == 2


# -- through Ray ------------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_command_resumes_a_half_done_output(half_done: Path):
    given = [f"data.shards={PHOTOS}", f"tokenizer={GOLDEN / RUN_TOKENIZER}", f"output={half_done}"]
    assert command("tokenize", *given, "tokens.passthrough=[txt]", "workers.count=1") == 4  # 2 of 17 samples are broken
    assert names.rows_of(half_done).equals(names.rows_of(GOLDEN / "out"))
    assert command("verify", f"output={half_done}", "verify.deep=true") == 0


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_audit_makes_old_rows_again():
    given = (f"output={GOLDEN / 'out'}", f"tokenizer={GOLDEN / RUN_TOKENIZER}", "workers.count=1")
    assert command("audit", *given) == 0


def history(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "reports/train.jsonl").read_text().splitlines()]


def assert_same_losses(run: Path) -> None:
    new, old = history(run), history(GOLDEN / "run")
    assert [row["step"] for row in new] == [1, 2, 3, 4]
    assert all(new_row.keys() >= old_row.keys() for new_row, old_row in zip(new, old, strict=True))
    measured = [name for name in old[0] if "second" not in name and "_per_s" not in name]
    for name in measured:
        np.testing.assert_allclose([r[name] for r in new], [r[name] for r in old], rtol=1e-3, err_msg=name)


def checkpoints(run: Path) -> list[Path]:
    return sorted(path for path in (run / "checkpoints").iterdir() if path.is_dir())


def assert_same_names_in_checkpoint(new: Path, old: Path) -> None:
    assert files_below(new) >= files_below(old)
    for file in files_below(old):
        read = json.loads if file.endswith(".json") else None
        found, known = (
            read((folder / file).read_text()) if read else torch.load(folder / file, weights_only=True)
            for folder in (new, old)
        )
        assert names.tensor_names(found).items() >= names.tensor_names(known).items(), file


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_training_resumes_from_an_old_checkpoint(run: Path):
    shutil.rmtree(run / "model")
    assert command("train", run / "config.yaml", f"run={run}", *TRAIN) == 0
    # The times are also equal, which shows that these steps did not run again.
    assert history(run)[:2] == history(GOLDEN / "run")[:2]
    assert_same_losses(run)
    assert files_below(run / "model") >= files_below(GOLDEN / "run/model")
    [old] = checkpoints(GOLDEN / "run")
    assert checkpoints(run)[0].name == old.name
    assert_same_names_in_checkpoint(checkpoints(run)[-1], old)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_new_training_has_the_same_losses_and_names(tmp_path: Path):
    new = tmp_path / "new"
    assert command("train", GOLDEN / "run/config.yaml", f"run={new}", *TRAIN) == 0
    assert_same_losses(new)
    assert_same_names_in_checkpoint(checkpoints(new)[-1], checkpoints(GOLDEN / "run")[-1])
    assert names.yaml_names(new / "config.yaml") >= names.yaml_names(GOLDEN / "run/config.yaml")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_same_codebook_is_made_of_cached_latents(run: Path):
    shutil.rmtree(run / "tokenizers")
    (run / "reports/codebook-vp_vae-K16.json").unlink()
    given = ["codebook.cache=true", "codebook.max_latents=200", "workers.count=1"]
    assert command("codebook", run / "config.yaml", f"run={run}", *given) == 0
    new, old = (names.load(root / "tokenizers/vp_vae-K16") for root in (run, GOLDEN / "run"))
    torch.testing.assert_close(names.codebook_of(new), names.codebook_of(old), rtol=1e-4, atol=1e-5)
    assert names.json_names(run / "reports") == names.json_names(GOLDEN / "run/reports")
