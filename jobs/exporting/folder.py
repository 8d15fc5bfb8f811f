"""The folder of an export.

TO/parts/plan.json says what is being written there, and TO/parts/NUMBER.json that a part is finished. TO/export.json is
written last, and parts/ is then removed.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from jobs.config import ConfigError
from jobs.exporting.format import PARTS, Part
from jobs.exporting.plan import Plan
from pipeline import storage
from pipeline.tokens.output import to_json

PLAN, RESULT = f"{PARTS}/plan.json", "export.json"


@dataclass(frozen=True)
class ExportFolder:
    url: str

    def is_complete(self, plan: Plan) -> bool:
        """Whether this export is finished. Raises ConfigError if another one is, or if a file of it is missing."""
        result = self._read(RESULT)
        if result is None:
            return False
        self._refuse_other(plan, result)
        sizes = self._sizes()
        for name, file in result["files"].items():
            if sizes.get(name) != file["num_bytes"]:
                raise ConfigError(
                    f"{self._at(name)} has {sizes.get(name, 'no')} bytes, but {RESULT} says {file['num_bytes']}; "
                    "remove the folder and rerun the command"
                )
        self._remove_parts()  # a run that was killed right after it finished leaves them
        return True

    def start(self, plan: Plan) -> None:
        """Records the plan. Raises ConfigError if the folder holds another export or files of something else."""
        found = self._read(PLAN)
        if found is None:
            others = [name for name in self._sizes() if not name.startswith(f"{PARTS}/.")]
            if others or storage.list_folders(self.url) not in ([], [self._at(PARTS)]):
                raise ConfigError(f"export.to: {self.url} holds other files; give a new or empty folder")
            try:
                storage.write_once(self._at(PLAN), to_json(plan.identity()))
            except FileExistsError:  # another process was first
                found = self._read(PLAN)
        if found is not None:
            self._refuse_other(plan, found)

    def finished_parts(self) -> dict[int, Part]:
        """The parts whose files are all there, by number."""
        sizes = self._sizes()
        receipts = [name for name in sizes if name.startswith(f"{PARTS}/") and name.endswith(".json") and name != PLAN]
        parts = [Part(**json.loads(storage.read(self._at(name)))) for name in receipts]
        return {
            part.number: part
            for part in parts
            if all(sizes.get(name) == file["num_bytes"] for name, file in part.files.items())
        }

    def write_part(self, number: int, commit: str, num_rows: int, num_tokens: int, files: dict[str, bytes]) -> Part:
        """Writes the files, and last the receipt that says that the part is finished."""
        for name, data in files.items():
            storage.replace(self._at(name), data)
        about = {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "num_bytes": len(data)} for name, data in files.items()
        }
        part = Part(number, commit, num_rows, num_tokens, about)
        storage.replace(self._at(PARTS, f"{number:06d}.json"), to_json(asdict(part)))
        return part

    def finish(self, plan: Plan, parts: list[Part]) -> None:
        """Writes the files made from all parts, and export.json; then removes parts/."""
        files = {name: file for part in parts for name, file in part.files.items() if not name.startswith(PARTS)}
        for name, chunks in plan.format.index(parts, self.url).items():
            sha256, num_bytes = storage.write_chunks(self._at(name), chunks)
            files[name] = {"sha256": sha256, "num_bytes": num_bytes}
        num_rows = sum(part.num_rows for part in parts)
        result = {
            **plan.identity(),
            "source": plan.output.url,
            "num_rows": num_rows,
            "num_tokens": sum(part.num_tokens for part in parts),
            "num_begin_end_tokens": num_rows * plan.format.marks,
            "num_quarantined": plan.num_quarantined,
            "num_shards_missing": plan.num_missing,
            "parts": [{"commit": p.commit, "num_rows": p.num_rows, "num_tokens": p.num_tokens} for p in parts],
            "files": files,
        }
        storage.replace(self._at(RESULT), to_json(result))
        self._remove_parts()

    def summary(self, plan: Plan, parts: list[Part]) -> Iterator[str]:
        num_rows, num_tokens = sum(part.num_rows for part in parts), sum(part.num_tokens for part in parts)
        form = plan.format
        yield f"{num_rows} rows with {num_tokens} tokens as {form.name} ({form.dtype.name}) in {self.url}"
        if unfinished := [*storage.temporary_files(self.url), *self._temporary()]:
            yield f"{len(unfinished)} unfinished files of a run that was killed are left, such as {unfinished[0]}"

    def _remove_parts(self) -> None:
        for name in (name for name in self._sizes() if name.startswith(f"{PARTS}/") and name != PLAN):
            storage.remove(self._at(name))
        storage.remove(self._at(PLAN))
        if not self._temporary():
            storage.remove(self._at(PARTS))

    def _temporary(self) -> list[str]:
        """Unfinished files of writers that were killed, or that still run."""
        return storage.temporary_files(self._at(PARTS))

    def _refuse_other(self, plan: Plan, found: dict[str, Any]) -> None:
        wrong = list(_differences(found, plan.identity()))
        if wrong:
            raise ConfigError(
                f"{self.url} holds another export: {'; '.join(wrong)}. Choose another export.to, or remove the folder"
            )

    def _sizes(self) -> dict[str, int | None]:
        """Bytes of each file, by its name in the folder."""
        found = [*storage.scan(self.url), *storage.scan(self._at(PARTS))]
        prefix = len(self.url) + 1
        return {file.url[prefix:]: file.num_bytes for file in found}

    def _read(self, name: str) -> dict[str, Any] | None:
        data = storage.read_if_exists(self._at(name))
        if data is None:
            return None
        try:
            return dict(json.loads(data))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{self._at(name)} is damaged ({error}); remove the folder and rerun") from error

    def _at(self, *names: str) -> str:
        return storage.join(self.url, *names)


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    for name, value in wanted.items():
        if found.get(name) != value:
            yield f"{name} is {found.get(name)} there and {value} here"
