"""The wheel: built as a release is, installed in a fresh environment, and used from another folder."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    _run([sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(folder), str(ROOT)], folder)
    [built] = folder.glob("tokenmill-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of a fresh environment with the wheel. It uses the dependencies of this one, but not the checkout."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    [own] = home.glob("lib/python*/site-packages")
    _run([sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--quiet", str(wheel)], home)
    # a line in a .pth extends sys.path without reading the .pth files there; one of those names the checkout
    borrowed = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")} | {p for p in sys.path if "-packages" in p}
    (own / "dependencies.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    return python


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_packages_the_configs_and_their_types(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    packages = ("jobs", "pipeline", "tokenizer", "tokenmill")
    modules = {str(f.relative_to(ROOT)) for name in packages for f in (ROOT / name).rglob("*.py")}
    configs = {f"tokenmill/{f.relative_to(ROOT)}" for f in (ROOT / "configs").rglob("*.yaml")}
    typed = {f"{name}/py.typed" for name in packages}
    templates = {str(f.relative_to(ROOT)) for f in (ROOT / "jobs/reports/templates").iterdir()}
    assert len(templates) > 5
    assert {n for n in names if ".dist-info/" not in n} == modules | configs | typed | templates


def test_reading_tokens_is_the_only_thing_that_the_base_install_pays_for(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = [archive.read(n).decode() for n in archive.namelist() if n.endswith("/METADATA")]
    needs = [line.removeprefix("Requires-Dist: ") for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert {one.split(">")[0] for one in needs if "extra ==" not in one} == {"numpy", "pyarrow", "fsspec"}


def test_every_package_that_an_error_may_name_is_in_the_extra_that_it_names():
    import tomllib

    from tokenmill.extras import EXTRAS

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    distributions = {"PIL": "pillow", "faiss": "faiss-cpu", "yaml": "pyyaml", "botocore": "s3fs", "aiobotocore": "s3fs"}
    for package, extra in EXTRAS.items():
        assert any(need.startswith(distributions.get(package, package)) for need in extras[extra]), package


def test_a_shipped_config_loads_from_another_folder(installed: Path, tmp_path: Path):
    code = """
import sys
import tokenmill
from jobs.config import load_config
from jobs.config.shipped import shipped_configs
config = load_config([str(shipped_configs() / "demo.yaml")])
print(tokenmill.__version__, config.quantizer["name"], len(list(shipped_configs().rglob("*.yaml"))))
print(*shipped_configs().relative_to(sys.prefix).parts[-3:])
"""
    count = len(list((ROOT / "configs").rglob("*.yaml")))
    first, second = _run([str(installed), "-c", code], tmp_path).splitlines()
    assert first == f"0.1.0 vp_vae {count}"
    assert second == "site-packages tokenmill configs"


def test_the_command_of_the_wheel_prints_its_help(installed: Path, tmp_path: Path):
    assert "tokenize" in _run([str(installed.parent / "tokenmill"), "--help"], tmp_path)


def test_method_files_are_found_beside_the_yaml_that_names_them(tmp_path: Path):
    from jobs.config import load_config

    (tmp_path / "own.yaml").write_text("quantizer: {name: fsq}")
    methods = "{A: own.yaml, B: {file: own.yaml, train: {lr: 1e-3}}, C: elsewhere.yaml, D: {quantizer: {name: fsp}}}"
    (tmp_path / "compare.yaml").write_text(f"quantizer: {{name: fsq}}\ncompare: {{methods: {methods}}}")
    loaded = load_config([str(tmp_path / "compare.yaml")]).compare.methods
    own = str(tmp_path / "own.yaml")
    assert (loaded["A"], loaded["B"]["file"], loaded["C"]) == (own, own, "elsewhere.yaml")
    assert "file" not in loaded["D"]
