"""The samples of a local folder and the folders in it.

The last dot of a medium's name ends the key. Any other file is a member of the sample whose name and dot it starts
with; the longest such name counts.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs.config import ConfigError
from jobs.packing.media import Media
from jobs.packing.names import is_reserved, member_name, printable, sample_key
from jobs.packing.sample import Packed
from jobs.packing.tally import Tally

OF_THE_SYSTEM = ("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "@eadir")
UNFINISHED = (".part", ".partial", ".crdownload", ".download", ".tmp", ".swp", ".bak", "~")


@dataclass
class Folder:
    """Links to files and folders are followed, but not into a folder that contains the link."""

    root: Path
    media: Media
    tally: Tally

    def samples(self) -> Iterator[Packed]:
        """In the order of their first files. Raises ConfigError for two files that would be the same member."""
        return self._walk(self.root, "", (self.root.resolve(),))

    def _walk(self, folder: Path, prefix: str, above: tuple[Path, ...]) -> Iterator[Packed]:
        entries = list(self._kept(folder, above))
        samples = self._samples(folder, prefix, [entry.name for entry in entries if not entry.is_dir()])
        for entry in entries:
            path = folder / entry.name
            if entry.is_dir():
                yield from self._walk(path, f"{prefix}{entry.name}/", (*above, path.resolve()))
            elif entry.name in samples:
                yield samples[entry.name]

    def _kept(self, folder: Path, above: tuple[Path, ...]) -> Iterator[os.DirEntry[str]]:
        """The entries of a folder by name, without those that hold no data of the user."""
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise ConfigError(f"{folder}: the folder cannot be listed ({error.strerror})") from error
        for entry in entries:
            reason = _reason_against(entry, above)
            if reason is None:
                yield entry
            else:
                self._skip(reason, folder / entry.name)

    def _samples(self, folder: Path, prefix: str, names: list[str]) -> dict[str, Packed]:
        """The samples of the files in one folder, by the name of their first file."""
        stems = {name.rpartition(".")[0] for name in names if self.media.extension(name)}
        groups: dict[str, dict[str, Path]] = {}
        first: dict[str, str] = {}
        for name in names:
            stem = self._stem(name, stems)
            member = member_name(name[len(stem) + 1 :])
            if not stem or is_reserved(member):
                self._skip(self._why_alone(name, stem), folder / name)
                continue
            _add(groups.setdefault(stem, {}), member, folder / name)
            first.setdefault(stem, name)
        return {first[stem]: Packed(sample_key(prefix + stem), dict(members)) for stem, members in groups.items()}

    def _stem(self, name: str, stems: set[str]) -> str:
        """The name of the sample that a file belongs to; empty if there is none."""
        stem = name.rpartition(".")[0]
        if self.media.extension(name):
            return stem
        while stem and stem not in stems:
            stem = stem.rpartition(".")[0]
        return stem

    def _why_alone(self, name: str, stem: str) -> str:
        if stem:
            return "names that webdataset reserves for itself"
        extension = name.rpartition(".")[2].lower() if "." in name else ""
        kind = f".{printable(extension)} files" if extension else "files without an extension"
        return f"{kind}, which belong to no {self.media.kind} file"

    def _skip(self, reason: str, path: Path) -> None:
        self.tally.skip(reason, path.relative_to(self.root).as_posix())


def _reason_against(entry: os.DirEntry[str], above: tuple[Path, ...]) -> str | None:
    name = entry.name.lower()
    if name in OF_THE_SYSTEM or name.startswith("._"):
        return "files and folders of the operating system"
    if name.startswith("."):
        return "hidden files and folders"
    if not os.path.exists(entry.path):
        return "links that lead nowhere"
    if entry.is_dir():
        is_circle = entry.is_symlink() and Path(entry.path).resolve() in above
        return "links to a folder that contains them" if is_circle else None
    if not entry.is_file():
        return "neither files nor folders"
    return "unfinished downloads and backups" if name.endswith(UNFINISHED) else None


def _add(members: dict[str, Path], member: str, file: Path) -> None:
    if member in members:
        raise ConfigError(
            f"{printable(str(file))} and {printable(str(members[member]))} would become the same member of a sample; "
            "rename one of them"
        )
    members[member] = file
