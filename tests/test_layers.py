"""jobs -> pipeline, jobs -> tokenizer, and nothing else. Reading token shards needs neither torch nor ray."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.corpus import write_tokens

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "tokenizer": {"ray", "fsspec", "s3fs", "omegaconf", "webdataset", "pyarrow", "pipeline", "jobs"},
    "pipeline": {"ray", "torch", "webdataset", "omegaconf", "tokenizer", "jobs"},
}
LAYERS = ("tokenizer", "pipeline", "jobs")
OPTIONAL = {f"pipeline/tokens/{name}.py": {"torch"} for name in ("processes", "rows")}  # tried, and not needed


def imports(file: Path) -> set[str]:
    """Top-level packages that the file imports anywhere, including inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            first = node.args[0] if node.args else None
            found |= {str(first.value).split(".")[0]} if isinstance(first, ast.Constant) else set()
    return found


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_layer_imports_nothing_above_it(layer: str):
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files
    for file in files:
        name = str(file.relative_to(ROOT))
        assert not imports(file) & (FORBIDDEN[layer] - OPTIONAL.get(name, set())), name


def test_torch_is_imported_by_the_data_layer_only_where_it_may_fail():
    tree = ast.parse((ROOT / "pipeline/tokens/processes.py").read_text())
    tries = [node for node in ast.walk(tree) if isinstance(node, ast.Try)]
    guarded = {id(inner) for node in tries for inner in ast.walk(node) if isinstance(inner, ast.ImportFrom)}
    of_torch = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and str(n.module).startswith("torch")]
    assert of_torch
    assert all(id(node) in guarded for node in of_torch)


def test_only_storage_opens_urls():
    users = {f.parent.name for layer in LAYERS for f in (ROOT / layer).rglob("*.py") if "fsspec" in imports(f)}
    assert users == {"storage"}


def modules(layers: Iterable[str] = LAYERS) -> dict[str, set[str]]:
    """Each of our modules, with our modules that it imports anywhere. A package stands for its __init__."""
    files = {file: _dotted(file) for layer in layers for file in sorted((ROOT / layer).rglob("*.py"))}
    names = set(files.values())
    graph: dict[str, set[str]] = {}
    for file, name in files.items():
        wanted = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        found = {f"{node.module}.{alias.name}" for node in wanted for alias in node.names}
        graph[name] = (found | {str(node.module) for node in wanted}) & names - {name}
    return graph


def _dotted(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_no_module_imports_itself_in_a_circle():
    # its own modules may not need what an __init__ re-exports
    graph = {name: {one for one in used if not name.startswith(f"{one}.")} for name, used in modules().items()}
    assert list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("layer", LAYERS)
def test_arrows_between_folders_run_one_way(layer: str):
    graph: dict[str, set[str]] = {}
    for name, used in modules([layer]).items():
        for one in used:
            source, target = _folder(name), _folder(one)
            if source != target and layer not in (source, target):  # files next to the folders belong to no folder
                graph.setdefault(source, set()).add(target)
    assert list(graphlib.TopologicalSorter(graph).static_order())


def _folder(module: str) -> str:
    is_package = (ROOT / module.replace(".", "/")).is_dir()
    return module if is_package else module.rsplit(".", 1)[0]


def python(code: str, *arguments: str) -> str:
    """Runs the code in a fresh interpreter; returns what it printed."""
    # skips the interpreter's own exit, where pyarrow's threads sometimes abort the process on a loaded machine
    leave = "\nimport os\nsys.stdout.flush()\nos._exit(0)\n"
    command = [sys.executable, "-W", "error::ImportWarning", "-c", "import sys\n" + code + leave, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_token_table_is_read_without_torch_or_ray(tmp_path: Path):
    output = write_tokens(tmp_path, [3])
    code = """
import sys
from pipeline.tokens import Output
from pipeline.tokens.verify import verify
import io, pyarrow.parquet as pq
output = Output.open(sys.argv[1])
[entry] = output.commits()
print(pq.read_table(io.BytesIO(output.read_tokens(entry.name))).num_rows, verify(output).problems)
print([name for name in ("torch", "ray", "webdataset") if name in sys.modules])
"""
    assert python(code, output.url).split("\n")[:2] == ["3 []", "[]"]


def test_token_dataset_reads_where_torch_cannot_be_imported(tmp_path: Path):
    output = write_tokens(tmp_path, [3, 2])
    code = """
import sys
sys.modules["torch"] = None  # importing it raises ImportError
from pipeline.tokens import TokenDataset
print(len(list(TokenDataset(sys.argv[1], shuffle_window=2))))
print("ray" in sys.modules)
"""
    assert python(code, output.url).split() == ["5", "False"]


def test_token_dataset_with_torch_imports_no_ray(tmp_path: Path):
    output = write_tokens(tmp_path, [3, 2])
    code = """
import sys
from pipeline.tokens import TokenDataset
from torch.utils.data import DataLoader, IterableDataset
dataset = TokenDataset(sys.argv[1])
print(isinstance(dataset, IterableDataset), len(list(DataLoader(dataset, batch_size=None))), "ray" in sys.modules)
"""
    assert python(code, output.url).split() == ["True", "5", "False"]


@pytest.mark.parametrize("command", ["status", "verify", "export", "--help"])
def test_a_command_without_a_model_imports_neither_torch_nor_ray(command: str, tmp_path: Path):
    """They take half a second instead of three."""
    output = write_tokens(tmp_path, (2, 3)).url
    settings = {"export": ["export.format=nanogpt", f"export.to={tmp_path}/exported"], "--help": []}
    words = [command, *([] if command == "--help" else [f"output={output}"]), *settings.get(command, [])]
    code = "import sys; from jobs.__main__ import main; code = main(sys.argv[1:]); "
    code += "sys.exit(code or 50 * bool({'torch', 'ray'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
