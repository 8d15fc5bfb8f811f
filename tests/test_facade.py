"""`import tokenmill`: what it offers, what it does not import, and its messages if something is missing."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.corpus import write_tokens

ROOT = Path(__file__).parent.parent


def run(code: str, *arguments: str, first: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter. sys.path starts with first and then has the checkout."""
    start = f"import sys; sys.path[:1] = [{str(first)!r}, {str(ROOT)!r}]\n"
    leave = "\nimport os; sys.stdout.flush(); os._exit(0)"  # at exit, pyarrow's threads may abort the interpreter
    command = [sys.executable, "-c", start + code + leave, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def without(*packages: str) -> str:
    """Code that makes the import of these packages fail."""
    return f"sys.modules.update(dict.fromkeys({packages!r}))\n"


def fake_package(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("")
    return folder


def test_importing_the_facade_imports_neither_torch_nor_ray_nor_numpy():
    done = run("import tokenmill; print([n for n in ('torch', 'ray', 'numpy', 'pyarrow') if n in sys.modules])")
    assert done.stdout == "[]\n", done.stderr


def test_the_facade_offers_the_tokenizer_the_dataset_and_the_version():
    import pipeline.tokens
    import tokenizer.tokenizer
    import tokenmill

    assert issubclass(tokenmill.Tokenizer, tokenizer.tokenizer.Tokenizer)
    assert tokenmill.TokenDataset is pipeline.tokens.TokenDataset
    assert tokenmill.__version__ == "0.1.0"
    assert dir(tokenmill) == sorted(tokenmill.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Tokeniser'"):
        _ = tokenmill.Tokeniser


def test_the_dataset_needs_numpy_pyarrow_and_fsspec_only(tmp_path: Path):
    output = write_tokens(tmp_path, [3, 2])
    code = """
class NothingElse:
    def find_spec(self, name, path=None, target=None):
        package = name.partition(".")[0]
        installed = ("numpy", "pyarrow", "fsspec", "pipeline", "tokenizer", "jobs", "tokenmill")
        if package not in (*sys.stdlib_module_names, *installed) and not package.startswith("_"):
            raise ModuleNotFoundError(name=package)

sys.meta_path.insert(0, NothingElse())
import tokenmill
print(len(list(tokenmill.TokenDataset(sys.argv[1], shuffle_window=2))))
"""
    done = run(code, output.url)
    assert done.stdout == "5\n", done.stderr


@pytest.mark.parametrize("name", ["tokenizer", "pipeline", "jobs"])
def test_a_package_of_the_same_name_is_refused_in_one_line(tmp_path: Path, name: str):
    done = run("import tokenmill", first=fake_package(tmp_path, name))
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"ImportError: `import {name}` finds {tmp_path / name / '__init__.py'} instead of")
    assert line.endswith("install Tokenmill in a fresh virtual environment")


def test_a_module_of_the_same_name_is_refused_too(tmp_path: Path):
    (tmp_path / "jobs.py").write_text("")
    assert f"finds {tmp_path / 'jobs.py'} instead of" in run("import tokenmill", first=tmp_path).stderr


@pytest.mark.parametrize(
    ("package", "code", "line"),
    [
        ("torch", "import tokenmill; tokenmill.Tokenizer", "tokenmill.Tokenizer needs the package torch: {tokenizer}"),
        ("torch", "{main}", "tokenmill train needs the package torch: {tokenizer}"),
        ("omegaconf", "{main}", "tokenmill train needs the package omegaconf: {jobs}"),
    ],
)
def test_a_missing_extra_is_named_with_the_line_that_installs_it(package: str, code: str, line: str):
    main = (
        "from tokenmill.__main__ import main; sys.argv[1:] = ['train', 'configs/demo.yaml']; raise SystemExit(main())"
    )
    done = run(without(package) + code.format(main=main))
    install = {name: f"pip install 'tokenmill[{name}]'" for name in ("tokenizer", "jobs")}
    assert done.stderr.splitlines()[-1].removeprefix("ImportError: ") == line.format(**install)
    assert done.returncode == (2 if code == "{main}" else 1)


@pytest.mark.parametrize(
    ("protocol", "package", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs"), ("abfs", "adlfs", "azure")]
)
def test_object_storage_without_its_extra_names_it(protocol: str, package: str, extra: str):
    code = f"""
from tokenmill.__main__ import main; sys.argv[1:] = ['verify', 'output={protocol}://bucket/x']; raise SystemExit(main())
"""
    done = run(without(package) + code)
    line = (
        f"tokenmill verify: {protocol}://bucket/x/dataset.json: {protocol}:// needs another package. "
        f"pip install 'tokenmill[{extra}]'"
    )
    assert (done.returncode, line in done.stderr) == (2, True), done.stderr
