"""Mistakes in a command end in exit code 2 and one readable line, before Ray starts."""

import dataclasses
import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from jobs.__main__ import COMMANDS, main
from jobs.artifacts import load_tokenizer
from jobs.config import Config, ConfigError, TrainConfig, find_config, load_config, with_method
from jobs.config.help import NAMED, names_in
from jobs.config.reference import FILE, reference
from jobs.config.renames import RENAMED
from jobs.config.schema import Key, all_keys
from jobs.train import _claim as claim
from tests.jobs.helpers import SAMPLES, make_a_checkpoint
from tokenizer.nets.base.net import NETS
from tokenizer.quantizers.base.quantizer import QUANTIZERS
from tokenizer.registry import Registry
from tokenizer.training.step import Recipe
from tokenmill import Tokenizer

CONFIGS = sorted((SAMPLES.parent / "configs").rglob("*.yaml"))
SHARDS = f"data.shards={SAMPLES}/heldout/*.tar"


@pytest.fixture
def write(tmp_path: Path):
    """write(text): path of a YAML file."""

    def make(text: str, name: str = "a.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return make


# -- keys and types -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("outptu=x", "output"),
        ("data.shrads=x", "data.shards"),
        ("train.stps=3", "train.steps"),
        ("tokens.encodin=list", "tokens.encoding"),
        ("workers.cuont=2", "workers.count"),
        ("codebook.sizes=2", "codebook.size"),
        ("model.nets=2", "model.net"),
        ("model.net.widht=8", "model.net.width"),
        ("quantizer.codebok_size=8", "quantizer.codebook_size"),
        ("data.preprocess.short_sid=8", "data.preprocess.short_side"),
        ("train.collapse.patiense=8", "train.collapse.patience"),
        ("depe=true", "verify.deep"),  # a key of another section
    ],
)
def test_unknown_key_is_named_with_its_nearest_neighbour(given: str, meant: str):
    with pytest.raises(ConfigError, match=rf"unknown key {given.split('=')[0]}; did you mean {meant}\?"):
        load_config([given])


def test_unknown_key_without_a_neighbour_lists_what_there_is():
    with pytest.raises(ConfigError, match=r"unknown key workers\.zzz; known keys: count, cpus, gpus"):
        load_config(["workers.zzz=1"])


@pytest.mark.parametrize(
    "given",
    [
        "decode.limit=many",
        "verify.deep=maybe",
        "train.lr=fast",
        "train.steps=1.5",
        "workers.count=two",
        "tokens.max_bad_fraction=few",
        "train.loss_weights.l1=x",
        "quantizer.codebook_size=big",
        "model.net.width=x",
        "model.net.multipliers=[1,x]",
        "data.preprocess.short_side=x",
        "workers=2",
        "quantizer=fsq",
    ],
)
def test_ill_typed_value_is_named_by_its_key(given: str):
    with pytest.raises(ConfigError) as raised:
        load_config([given])
    assert str(raised.value).startswith(given.split("=")[0])


def test_text_of_untyped_settings_becomes_numbers_and_booleans():
    """These settings have no declared type, and the text "false" would be true."""
    config = load_config(["metrics.slow=false", "metrics.perceptual_weights=w.safetensors", "train.losses.scale=2"])
    assert config.metrics == {"slow": False, "perceptual_weights": "w.safetensors"}
    assert config.train.losses == {"scale": 2}


def test_text_of_a_residuals_base_becomes_what_it_says():
    given = ["quantizer.name=residual", "quantizer.base.name=vq_vae", "quantizer.base.codebook_size=32"]
    assert load_config(given).quantizer["base"] == {"name": "vq_vae", "codebook_size": 32}


@pytest.mark.parametrize("given", ["train.betas=[1,2,3]", "train.betas=[a,b]"])
def test_ill_typed_element_of_a_tuple_is_named_by_its_key(given: str):
    with pytest.raises(ConfigError, match=r"train\.betas"):
        load_config([given])


@pytest.mark.parametrize("value", ["3", "[1, 2]", "{a: b}"])
def test_shards_must_be_text(write, value: str):
    with pytest.raises(ConfigError, match=r"data\.shards is .*; it must be a path, a glob, braces, or a list"):
        load_config([write(f"data: {{shards: {value}}}")])


def test_values_of_a_methods_own_fields_are_checked_by_the_method():
    with pytest.raises(ConfigError, match=r"quantizer\.eta is 'fast'; it must be a number above 0, or auto"):
        load_config(["quantizer.name=vp_vae", "quantizer.eta=fast"])


def test_another_quantizers_field_is_unknown():
    assert load_config(["quantizer.name=fsq", "quantizer.levels=[4,4]"]).quantizer["levels"] == [4, 4]
    with pytest.raises(ConfigError, match=r"unknown key quantizer\.levels"):
        load_config(["quantizer.name=vp_vae", "quantizer.levels=[4,4]"])


@pytest.mark.parametrize(
    ("given", "near"),
    [("quantizer.name=vpvae", "vp_vae"), ("model.net.name=vqgann", "vqgan"), ("model.modality=imag", "image")],
)
def test_unknown_name_is_reported_with_its_nearest_neighbour(given: str, near: str):
    with pytest.raises(ConfigError, match=f"did you mean '{near}'"):
        load_config([given])


def test_defaults_of_the_named_parts_are_filled_in():
    config = load_config(["quantizer.name=fsq"])
    assert config.quantizer["edges"] == "symmetric"
    assert config.model.net["patch_size"] == 1
    assert config.data.preprocess["max_side"] == 16_384


# -- descriptions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", list(all_keys()), ids=lambda key: key.name)
def test_a_key_has_a_description_and_commands(key: Key):
    assert key.description
    assert "\n" not in key.description
    assert key.commands
    assert set(key.commands) <= set(COMMANDS)


def test_keys_are_those_of_the_configuration():
    names = {key.name for key in all_keys()}
    assert len(names) == len(list(all_keys()))
    for name in names:
        functools.reduce(getattr, name.split("."), Config())


def test_a_recipe_has_the_defaults_of_the_configuration():
    """The fields exist twice, because the recipe of a comparison must keep its names."""
    assert TrainConfig().recipe() == Recipe()
    assert load_config(["train.crop_size=32", "train.discriminator.lr=0.5"]).train.recipe() == Recipe(
        segment=32, discriminator=dataclasses.replace(Recipe().discriminator, lr=0.5)
    )


def test_the_reference_is_up_to_date():
    assert FILE.read_text() == reference(), "run `python -m jobs.config.reference`"


@pytest.mark.parametrize(("package", "registry"), [(NAMED["quantizer"], QUANTIZERS), (NAMED["model.net"], NETS)])
def test_help_names_every_method(package: str, registry: Registry):
    assert names_in(package) == registry.names()


# -- old names ----------------------------------------------------------------------------------------------------

OLD = {
    "train.accumulate": "4",
    "train.segment": "64",
    "train.evaluate_every": "7",
    "train.pictures": "3",
    "train.collapse_below": "2.5",
    "train.collapse_steps": "9",
    "train.collapse_stops": "true",
    "compare.pictures": "5",
    "source": "photos",
    "shards": "out/%03d.tar",
    "samples_per_shard": "11",
    "shuffle_seed": "3",
    "keys": "[0002]",
    "limit": "2",
    "to": "png",
    "deep": "true",
    "repair": "true",
    "json": "true",
}


def test_every_old_name_is_tested():
    assert OLD.keys() == RENAMED.keys()


@pytest.mark.parametrize("old", OLD)
def test_an_old_name_still_works_and_prints_one_notice(old: str, capsys: pytest.CaptureFixture[str]):
    config = load_config([f"{old}={OLD[old]}"])
    [notice] = capsys.readouterr().err.splitlines()
    assert notice == f"tokenmill: {old} is now {' and '.join(RENAMED[old])}; the old name still works"
    assert config == load_config([f"{key}={OLD[old]}" for key in RENAMED[old]]) != Config()
    assert capsys.readouterr().err == ""


def test_an_old_name_in_a_file_is_overridden_by_the_new_one(write, capsys: pytest.CaptureFixture[str]):
    file = write("train: {segment: 16}\nto: a/b\nlimit: 3\n")
    config = load_config([file, "train.crop_size=32", "decode.limit=4"])
    assert (config.train.crop_size, config.decode.output) == (32, "a/b")
    assert (config.decode.limit, config.evaluate.num_examples) == (4, 3)
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_both_names_at_once_are_refused():
    with pytest.raises(ConfigError, match=r"train\.segment is the old name of train\.crop_size; give only"):
        load_config(["train.segment=16", "train.crop_size=16"])


def test_a_method_file_may_have_old_names(write):
    file = write("quantizer: {name: fsq}\ntrain: {segment: 16}\n")
    assert with_method(load_config([]), file, {"train": {"accumulate": 2}}).train.crop_size == 16


@pytest.fixture
def old_run(tmp_path: Path) -> str:
    """A run with a checkpoint, whose config.yaml has old names."""
    make_a_checkpoint(tmp_path)
    (tmp_path / "config.yaml").write_bytes((SAMPLES.parent / "tests/golden/run/config.yaml").read_bytes())
    return str(tmp_path)


def test_a_run_with_old_names_resumes(old_run: str):
    config = load_config([f"{old_run}/config.yaml"])
    assert (config.train.crop_size, config.train.collapse.patience) == (16, 500)
    claim(old_run, config)
    claim(old_run, load_config([f"{old_run}/config.yaml", "train.collapse.patience=9", "train.num_examples=2"]))


def test_a_run_with_old_names_refuses_another_crop_size(old_run: str):
    with pytest.raises(ConfigError, match=r"train\.crop_size=16, not 32"):
        claim(old_run, load_config([f"{old_run}/config.yaml", "train.crop_size=32"]))


AUDIO = ["model.modality=audio", "model.net={name: seanet}"]


def test_a_run_that_does_not_state_its_downmix_resumes_with_the_mean(tmp_path: Path, capsys):
    config = load_config(AUDIO)
    assert config.data.preprocess["downmix"] == "bs775"
    claim(str(tmp_path), config)
    stored = OmegaConf.load(tmp_path / "config.yaml")
    for key in ("downmix", "gapless", "allow_truncated"):
        del stored.data.preprocess[key]
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(stored))
    again, _ = claim(str(tmp_path), load_config(AUDIO))
    assert (again.data.preprocess["downmix"], again.data.preprocess["gapless"]) == ("mean", False)
    printed = capsys.readouterr().out
    assert "started by an earlier version and keeps data.preprocess.downmix=mean" in printed
    assert "started by an earlier version and keeps data.preprocess.gapless=False" in printed


def test_a_run_that_states_its_downmix_refuses_another(tmp_path: Path):
    claim(str(tmp_path), load_config(AUDIO))
    make_a_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.preprocess\.downmix=bs775, not mean"):
        claim(str(tmp_path), load_config([*AUDIO, "data.preprocess.downmix=mean"]))


# -- files and overrides ------------------------------------------------------------------------------------------


def test_files_merge_left_to_right_and_overrides_beat_them(write):
    first = write("run: a\ntrain: {steps: 1, lr: 0.5, seed: 1}\n", "first.yaml")
    second = write("train: {steps: 2, lr: 0.25}\n", "second.yaml")
    config = load_config([first, "train.lr=0.125", second])
    assert (config.run, config.train.seed, config.train.steps, config.train.lr) == ("a", 1, 2, 0.125)


def test_a_value_may_refer_to_another(write):
    assert load_config([write("run: r/x\noutput: ${run}/tokens\n")]).output == "r/x/tokens"


@pytest.mark.parametrize("file", CONFIGS, ids=str)
def test_a_shipped_config_loads_and_has_no_old_names(file: Path, capsys: pytest.CaptureFixture[str]):
    load_config([str(file)])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("demo", "demo.yaml"),
        ("fsp", "quantizers/fsp.yaml"),
        ("compare/quick", "compare/quick.yaml"),
        ("quantizers/fsp.yaml", "quantizers/fsp.yaml"),
        ("configs/quantizers/fsp.yaml", "quantizers/fsp.yaml"),
    ],
)
def test_a_name_finds_a_shipped_config_from_any_folder(
    name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == SAMPLES.parent / "configs" / file
    (tmp_path / "fsp").write_text("quantizer: {name: fsp}\n")
    assert find_config("fsp") == Path("fsp")  # the user's own file takes precedence


def test_names_of_shipped_configs_are_unique():
    assert len({file.stem for file in CONFIGS}) == len(CONFIGS)


def test_a_misspelt_shipped_config_is_refused_with_its_nearest_neighbour():
    with pytest.raises(ConfigError, match=r"did you mean demo\?"):
        load_config(["dmo"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: [a\nb: {", "is not valid YAML"),
        ("run:\n\t- x", "is not valid YAML"),
        ("run: a\nrun: b", "duplicate key run"),
        ("- a\n- b\n", "must hold keys with values"),
        ("train:\n", "train is None; it must hold keys: steps"),
        ("run: ${nope}", "nope"),
    ],
)
def test_a_broken_file_gives_a_one_line_error(write, text: str, message: str):
    with pytest.raises(ConfigError, match=message) as raised:
        load_config([write(text)])
    assert len(str(raised.value).splitlines()) == 1


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"'nope\.yaml' is neither a YAML file, nor a shipped config, nor KEY=VALUE"):
        load_config(["nope.yaml"])


def test_an_override_that_is_no_yaml_is_reported():
    with pytest.raises(ConfigError, match=r"run=\[a is not KEY=VALUE"):
        load_config(["run=[a"])


@pytest.mark.parametrize("value", ["000123", "1e3", "yes", "2024_01", "0x10", "12:30", "null"])
def test_text_that_looks_like_a_number_stays_as_it_was_typed(value: str):
    config = load_config([f"run={value}", f"decode.keys=[{value}]"])
    assert (config.run, config.decode.keys) == (value, [value])


# -- the command line ---------------------------------------------------------------------------------------------


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command leaves on stderr."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    [line] = printed.err.splitlines()
    assert line.startswith(f"tokenmill {arguments[0]}: ")
    assert (
        printed.out.splitlines()[-1]
        == f"tokenmill {arguments[0]}: exit 2: a mistake in the command or its configuration"
    )
    return line


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting Ray fails the test."""

    def start() -> None:
        raise AssertionError("Ray must not start")

    monkeypatch.setattr("jobs.actors.cluster.start", start)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("frobnicate", "unknown command 'frobnicate'; choose one of: pack, import, train"),
        ("train run=R data.shrads=x", "did you mean data.shards?"),
        ("train data.shards=S", "run is not set"),
        ("train run=R", "data.shards is not set"),
        ("train run=R data.shards=S quantizer.name=vqvae", "did you mean 'vq_vae'?"),
        ("train run=R data.shards=S train.loss_weights.l3=1", "no such loss; choose from: l1, mse"),
        (
            "train run=R data.shards=S train.crop_size=33",
            "train.crop_size is 33; it must be a multiple of the",
        ),
        ("train run=R data.shards=S train.precision=fp16", "train.precision is 'fp16'"),
        ("train run=R data.shards=/nope/*.tar", "nothing matches '/nope/*.tar'"),
        ("train run=R data.shards=/nope/{a", "/nope/{a"),
        ("codebook run=R", "data.shards is not set"),
        ("codebook run=R data.shards=S", "holds no trained model; run `tokenmill train` first"),
        ("tokenize data.shards=S tokenizer=T", "output is not set"),
        ("tokenize output=O tokenizer=T", "data.shards is not set"),
        ("tokenize output=O data.shards=S", "run is not set"),
        ("tokenize output=O data.shards=S run=R", "run `tokenmill codebook` first"),
        ("tokenize output=O data.shards=S tokenizer=R", "is not a tokenizer"),
        ("tokenize output=O data.shards=/nope/*.tar tokenizer=T", "nothing matches '/nope/*.tar'"),
        ("tokenize output=O data.shards=S tokenizer=T tokens.encoding=zip", "choose one of: list, packed"),
        ("evaluate data.shards=S run=R", "run `tokenmill codebook` first"),
        ("evaluate data.shards=/nope/*.tar tokenizer=T", "nothing matches '/nope/*.tar'"),
        ("status", "output is not set"),
        ("status output=O", "is not an output of `tokenmill tokenize`"),
        ("verify output=O", "is not an output of `tokenmill tokenize`"),
        ("decode output=O decode.output=R", "is not an output of `tokenmill tokenize`"),
        ("pack pack.shards=R", "pack.source is not set"),
        ("pack pack.source=/nope pack.shards=R", "/nope does not exist; a folder must be on this machine"),
        ("pack pack.source=/nope.parquet pack.shards=R", "/nope.parquet does not exist"),
        # shapes of values
        ("train run=R data.shards=S train=[1]", "train is ['1']; it must hold keys: steps, batch_size"),
        ("train run=R data.shards=S quantizer=fsp", "quantizer is 'fsp'; it must hold keys with values, such as quant"),
        ("train run=R data.shards=S quantizer=[1]", "quantizer is ['1']; it must hold keys with values"),
        ("train run=R data.shards=S train.loss_weights=[1]", "train.loss_weights is ['1']; it must hold keys"),
        ("train run=R data.shards=S metrics=[1]", "metrics is ['1']; it must hold keys with values"),
        ('train run=R data.shards=S train.betas={"a":1}', "train.betas is {'a': '1'}; it must be a list"),
        ("train run=R data.shards=S train.steps=1e3", "train.steps is '1e3'; it must be a whole number"),
        ("train run=R data.shards=S train.compile=maybe", "train.compile is 'maybe'; it must be true or false"),
        ("train run=R data.shards=S train.lr=nan", "train.lr is nan; it must be a finite number"),
        ("train run=R data.shards=S workers.gpus=inf", "workers.gpus is inf; it must be a finite number"),
        ("train run=R data.shards=S train.betas=[0.9,nan]", "train.betas is nan; it must be a finite number"),
        ("train run=R data.shards=S train..steps=1", "has an empty key; write KEY=VALUE"),
        ("train run=R data.shards=S =1", "has an empty key; write KEY=VALUE"),
        ("train run=R data.shards=S train.steps=${nope", "train.steps=${nope"),
        ("decode output=O decode.output=R decode.limit=-3", "decode.limit is -3; it must be 1 or more"),
        # URLs and paths
        ("train run=foo://x data.shards=S", "unknown protocol 'foo'"),
        ("train run=R data.shards=foo://x/y.tar", "unknown protocol 'foo'"),
        ("train run=R data.shards=oss://x/y.tar", "oss:// needs another package"),
        ("tokenize output=O data.shards=S tokenizer=foo://x", "unknown protocol 'foo'"),
        ("train run=/proc/x data.shards=S", "'/proc/x'; check this path"),
        ("train run=/dev/null/x data.shards=S", "'/dev/null/x/config.yaml'; check this path"),
        ("pack pack.samples_per_shard=999999999999999999999", "999999999999999999999; it must be a number of 64 bits"),
        ("train run=R data.shards=S train.lr=-1", "train.lr is -1.0; it must be 0 or more"),
        ("train run=R data.shards=S train.keep_checkpoints=0", "train.keep_checkpoints is 0; it must be 1 or more"),
        ("tokenize output=O data.shards=S tokens.decode_threads=0", "tokens.decode_threads is 0; it must be 1 or more"),
        (
            "tokenize output=O data.shards=S tokens.max_bad_fraction=-1",
            "max_bad_fraction is -1.0; it must be from 0 to 1",
        ),
        (
            "compare run=R compare.heldout=[[1]]",
            "compare.heldout is [['1']]; it must be a path, a glob, braces, or a list",
        ),
        ("compare run=R compare.others.a=[[1]]", "compare.others.a is [['1']]; it must be a path"),
        ("compare run=R compare.seeds=[0,-1]", "compare.seeds holds -1; each must be 0 or more"),
        ("audit output=O audit.seed=-1", "audit.seed is -1; it must be 0 or more"),
        ("train run=R data.shards=S train.seed=-1", "train.seed is -1; it must be 0 or more"),
        ("train run=R data.shards=S quantizer=${nothing}", "quantizer: Interpolation key 'nothing' not found"),
        (
            "train run=R data.shards=S model.net=${oc.env:NOT_SET}",
            "Environment variable 'NOT_SET' not found",
        ),
        ("verify output=O verify.withdraw=[[1]]", "verify.withdraw holds ['1']; its items must be single values"),
        ("status output=/dev/null", "Not a directory: '/dev/null/dataset.json'"),
        # paths in Ray's copy of the working directory, which is deleted after a job
        ("train run=U/run data.shards=S", "run is U/run: a path in Ray's copy of the working directory"),
        ("tokenize output=U/out data.shards=S tokenizer=T", "output is U/out: a path in Ray's copy"),
        ("decode output=O decode.output=U/x", "decode.output is U/x: a path in Ray's copy"),
        ("pack pack.source=S pack.shards=U/%06d.tar", "pack.shards is U/%06d.tar: a path in Ray's copy"),
    ],
)
def test_mistakes_are_reported_in_one_line_before_ray_starts(
    arguments: str, message: str, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    places = {"S": f"{SAMPLES}/heldout/*.tar", "T": tokenizer, "R": f"{tmp_path}/run", "O": f"{tmp_path}/out"}
    words = [key + eq + places.get(value, value) for key, eq, value in (a.partition("=") for a in arguments.split())]
    uploaded = "/tmp/ray/working_dir_files/_ray_pkg_1"
    words = [word.replace("=U/", f"={uploaded}/") for word in words]
    assert message.replace("U/", f"{uploaded}/") in refused(words, capsys)
    assert list(tmp_path.iterdir()) == []  # a command that was refused leaves nothing behind


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    "given",
    [
        "train.losses.perceptuall=squeeze",
        "model.net.multipliers=[]",
        "train.steps=0",
        "train.batch_size=0",
        "workers.count=-1",
        "quantizer.codebook_size=0",
    ],
)
def test_values_that_cannot_work_are_refused_before_ray_starts(
    given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert given.split("=")[0] in refused(["train", f"run={tmp_path}/run", SHARDS, given], capsys)


@pytest.mark.parametrize("key", ["decode.keys", "tokens.passthrough"])
def test_a_single_value_is_a_list_of_one(key: str):
    section, name = key.split(".")
    config = load_config(["quantizer.name=fsp", f"{key}=0002"])
    assert getattr(getattr(config, section), name) == ["0002"]


@pytest.mark.parametrize("given", [["--help"], ["train", "--help"], ["train", "--print"]])
def test_a_reader_that_closes_the_pipe_gets_no_traceback(given: list[str]):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        command = [sys.executable, "-m", "jobs", *given]
        done = subprocess.run(command, cwd=SAMPLES.parent, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def test_without_a_command_the_commands_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main([]) == main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name}" in printed for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_has_help(command: str, flag: str, capsys: pytest.CaptureFixture[str]):
    assert main([command, "whatever.yaml", flag]) == 0
    assert f"Usage: tokenmill {command} [CONFIG ...] [key=value ...]" in capsys.readouterr().out


def test_help_shows_only_the_keys_of_the_command(capsys: pytest.CaptureFixture[str]):
    assert main(["status", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("=")[0] for line in lines if line.startswith("  ")] == [
        *("  output", "  status.json", "  storage.options", "  storage.create_only")
    ]
    [line] = [line for line in lines if line.startswith("  status.json=false")]
    assert line.endswith("  print JSON for programs; --json is short for it")


def test_help_points_to_the_settings_of_the_methods(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "--help"]) == 0
    said = capsys.readouterr().out
    assert "bsq, ema_vq, fsp" in said
    assert "docs/reference/configuration.md" in said


def test_version(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tokenmill {importlib.metadata.version('tokenmill')}\n"


def test_print_shows_the_merged_configuration_and_stops(write, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    given = ["demo", "train.steps=7", "run=" + str(tmp_path / "run"), "storage.options={s3: {key: secret}}"]
    assert main(["train", *given, "--print"]) == 0
    said = capsys.readouterr().out
    assert "secret" not in said
    assert "verify" not in said  # a key of another command
    again, config = load_config([write(said)]), load_config(given)
    assert (again.run, again.train, again.quantizer) == (config.run, config.train, config.quantizer)
    assert again.train.steps == 7
    assert not (tmp_path / "run").exists()


def test_print_refuses_mistakes(capsys: pytest.CaptureFixture[str]):
    assert "did you mean train.steps?" in refused(["train", "--print", "train.stps=3"], capsys)


def test_the_shell_sees_exit_code_2_and_no_traceback(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "jobs", "train", f"run={tmp_path}/r", "data.shards=/nope/*.tar"],
        capture_output=True,
        text=True,
        cwd=SAMPLES.parent,
    )
    assert done.returncode == 2
    assert done.stderr == "tokenmill train: data.shards: nothing matches '/nope/*.tar'\n"


@pytest.mark.parametrize("given", [["--help"], ["train", "--help"]])
def test_help_needs_neither_torch_nor_ray(given: list[str]):
    """It is what people type first; torch and ray take seconds to import."""
    code = f"import sys; from jobs.__main__ import main; main({given}); print({{'torch', 'ray'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SAMPLES.parent)
    assert done.stdout.endswith("\nset()\n")


def test_what_was_given_can_be_written_down_and_read_again(write, tmp_path: Path):
    """RUN/config.yaml and OUT/dataset.json hold the whole config."""
    config = load_config([str(SAMPLES.parent / "configs/demo.yaml")])
    again = write(OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config))))
    assert load_config([again]) == config


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["tran"], "unknown command 'tran'; did you mean train?"),
        (["train", "train.steps", "5"], "'train.steps' is neither .* did you mean train.steps=...?"),
        (["train", "configs/demo.yml"], "did you mean configs/demo.yaml?"),
        (["train", "dem"], "did you mean demo?"),
    ],
)
def test_a_misspelled_word_gets_a_proposal(
    words: list[str], hint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(SAMPLES.parent)
    assert main(words) == 2
    assert re.search(hint.replace("?", r"\?"), capsys.readouterr().err)


def test_a_folder_that_holds_tokenizers_names_them(tmp_path: Path, tokenizer: str):
    shutil.copytree(tokenizer, tmp_path / "run/tokenizers/tiny")
    for url in (tmp_path / "run/tokenizers", tmp_path / "run"):
        with pytest.raises(ConfigError, match=rf"did you mean {tmp_path}/run/tokenizers/tiny\?"):
            load_tokenizer(str(url))
        with pytest.raises(FileNotFoundError, match=rf"did you mean {tmp_path}/run/tokenizers/tiny\?"):
            Tokenizer.from_pretrained(url)


@pytest.mark.parametrize("file", [file for file in CONFIGS if "${run}" in file.read_text()], ids=lambda file: file.stem)
def test_outputs_of_a_shipped_config_follow_the_run(file: Path):
    """Else `run=runs/mine` alone would write into the tokens of the demo."""
    config = load_config([str(file), "run=runs/mine"])
    assert config.output == "runs/mine/tokens"
    assert config.decode.output in ("", "runs/mine/decoded")


def test_no_shipped_config_names_its_run_twice():
    for file in CONFIGS:
        run = re.search(r"^run: (\S+)$", text := file.read_text(), re.MULTILINE)
        assert run is None or text.count(f"{run[1]}/") == 0, file
