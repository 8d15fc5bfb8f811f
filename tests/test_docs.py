"""README and docs: length, links, keys of all commands, and code blocks that run in order.

The title of a block that cannot run here gives the reason, such as ```sh title="needs a cluster". NOT_RUN lists them.
"""

import collections
import dataclasses
import os
import re
import shlex
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs.__main__ import COMMANDS, _as_setting, main
from jobs.config import Config, load_config
from jobs.config.renames import RENAMED

ROOT = Path(__file__).parent.parent
RUN_IN_THIS_ORDER = (
    "README.md",
    *(f"docs/tutorials/{name}.md" for name in ("pictures", "audio", "cluster", "object-storage", "ray-data")),
    "docs/tutorials/import.md",
    "docs/python.md",
)
PAGES = ("README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md")))
NOT_RUN = {
    ("README.md", "installs packages"): 1,
    ("README.md", "installs packages, needs a GPU"): 1,
    ("README.md", "needs a cluster"): 1,
    ("docs/tutorials/audio.md", "installs packages"): 1,
    ("docs/tutorials/cluster.md", "needs a cluster"): 2,
    ("docs/tutorials/import.md", "installs packages"): 1,
    ("docs/tutorials/import.md", "downloads a model"): 1,
    ("docs/tutorials/object-storage.md", "needs S3"): 2,
}
# Settings with which the blocks take only seconds. The copy of samples/ is also small: see `checkout`.
TINY = {
    "train": ["train.steps=3", "train.batch_size=4", "train.warmup_steps=1", "workers.cpus=1"],
    **{command: ["workers.count=1"] for command in ("codebook", "tokenize", "audit", "retry", "evaluate")},
}
SHARDS, SAMPLES = 2, 8  # of each folder of samples/, and of each shard

FENCE = re.compile(r'^```(\w+)?(?: title="([^"]*)")?[^\n]*\n(.*?)^```$', re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass
class Block:
    """A fenced block of code. title: why it does not run, if it does not."""

    page: str
    language: str
    title: str
    text: str

    def commands(self) -> list[list[str]]:
        """Shell commands as words, without comments, operators between them, or printed output."""
        text = re.sub(r"\\\n\s*", " ", self.text)
        lines = text.splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        found = []
        for line in lines:
            for part in line.split(" && "):
                if words := shlex.split(part, comments=True):
                    found.append(words)
        return found


def blocks(page: str) -> list[Block]:
    found = FENCE.findall((ROOT / page).read_text())
    return [Block(page, language, title, text) for language, title, text in found]


def shell_blocks(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.language in ("sh", "console")]


def arguments(words: list[str]) -> list[str] | None:
    """COMMAND and its arguments, if the words run tokenmill, directly or as a Ray job."""
    for start in (["tokenmill"], ["python", "-m", "jobs"]):
        for i in range(len(words)):
            if words[i : i + len(start)] == start:
                return words[i + len(start) :]
    return None


# -- claims that need no commands -------------------------------------------------------------------------------------


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", "CONTRIBUTING.md"])
def test_every_relative_link_leads_somewhere(page: str):
    text = FENCE.sub("", (ROOT / page).read_text())
    for link in LINK.findall(text):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = Path(os.path.normpath(ROOT / page / ".." / path)) if path else ROOT / page
        assert target.exists(), f"{page} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page} links to {link}, which has no such heading"


def anchors(page: Path) -> set[str]:
    """The anchor that MkDocs and GitHub give to a heading of letters, digits, spaces and hyphens."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().strip().replace(" ", "-") for heading in headings}


def test_blocks_that_do_not_run_are_these():
    titled = collections.Counter(
        (block.page, block.title) for page in RUN_IN_THIS_ORDER for block in blocks(page) if block.title
    )
    assert titled == NOT_RUN


@pytest.mark.parametrize("page", PAGES)
def test_every_command_has_valid_keys(page: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    for block in shell_blocks(page):
        for words in block.commands():
            if (found := arguments(words)) is None:
                continue
            command, *rest = found
            assert command in COMMANDS
            load_config([_as_setting(word, command) for word in rest if not word.startswith("--")])


def test_cluster_commands_are_found():
    """Otherwise the test above could pass because it finds nothing."""
    for page, least in (("README.md", 3), ("docs/tutorials/cluster.md", 4), ("docs/tutorials/object-storage.md", 2)):
        found = [arguments(words) for block in shell_blocks(page) if block.title for words in block.commands()]
        assert len([one for one in found if one]) >= least


def test_pip_lines_pin_the_torch_of_the_constraints():
    [pinned] = re.findall(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    for page in PAGES:
        for block in shell_blocks(page):
            for words in block.commands():
                torch = [word for word in words if word.startswith("torch")]
                assert torch in ([], [pinned]), f"{page}: {words}"


def test_every_config_key_of_the_pages_is_in_the_schema():
    """`train.something` in running text must be a key, or the old name of one."""
    known = {field.name for field in dataclasses.fields(Config().train)}
    known |= {"html", "jsonl", "bin", "py"}  # files
    known |= {name.removeprefix("train.") for name in RENAMED}
    for page in PAGES:
        for key in re.findall(r"`train\.(\w+)", (ROOT / page).read_text()):
            assert key in known, f"{page}: train.{key}"


# -- the blocks themselves ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that the commands read, with a few samples per folder. The "my" files come from there."""
    copy = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "configs", copy / "configs")
    shutil.copy(ROOT / "demo.sh", copy)
    (copy / "docs").mkdir()
    shutil.copy(ROOT / "docs/demo.jpg", copy / "docs")
    for folder in ("train", "heldout", "speech/train", "speech/heldout"):
        for shard in sorted((ROOT / "samples" / folder).glob("*.tar"))[:SHARDS]:
            _cut(shard, copy / "samples" / folder / shard.name)
    _unpack(copy / "samples/heldout", copy / "my/photos")
    _unpack(copy / "samples/speech/heldout", copy / "my/recordings")
    return copy


def _cut(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    keys: set[str] = set()
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for member in old:
            keys.add(member.name.split(".")[0])
            if len(keys) > SAMPLES:
                return
            new.addfile(member, old.extractfile(member))


def _unpack(shards: Path, folder: Path) -> None:
    for shard in shards.glob("*.tar"):
        with tarfile.open(shard) as archive:
            archive.extractall(folder, filter="data")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("page", RUN_IN_THIS_ORDER)
def test_blocks_run_in_their_order(page: str, checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """All pages share the copy, like a reader's checkout: the tutorials use the results of README's `make demo`."""
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("HF_HOME", str(tmp_path))  # Hugging Face datasets keeps a cache there
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.title:
            continue
        if block.language == "python":
            exec(compile(block.text, page, "exec"), names)
        elif block.language in ("sh", "console"):
            for words in block.commands():
                _run(words, checkout)


def _run(words: list[str], checkout: Path) -> None:
    if words == ["make", "demo"]:
        for step in _steps(checkout / "demo.sh"):
            _run(["tokenmill", *step], checkout)
    elif words[0] == "export":
        assert words[1].startswith("PATH=")
    else:
        found = arguments(words)
        assert found, f"{shlex.join(words)}: this test cannot run it; give its block a title with the reason"
        code = main([*found, *TINY.get(found[0], [])])
        assert code == 0, f"{shlex.join(words)} ended with exit code {code}"


def _steps(script: Path) -> Iterator[list[str]]:
    """The commands of demo.sh."""
    text = script.read_text()
    [config] = re.findall(r"^config=(.*)$", text, re.MULTILINE)
    for line in re.findall(r"^step (.*)$", text, re.MULTILINE):
        yield shlex.split(line.replace("$config", config))
