"""Writes the tokens of an output in the format of another reader: `export.format`, into the folder `export.to`.

Each token shard becomes one part. Rerun the same command to continue after a stop: finished parts are kept.
The folder's export.json then holds the counts, the settings, and the checksum of each file. See docs/export.md.
"""

from jobs.config import Config, ConfigError
from jobs.exporting.folder import ExportFolder
from jobs.exporting.format import FORMATS
from jobs.exporting.parts import write_parts
from jobs.exporting.plan import Plan
from jobs.outputs import open_output
from pipeline import storage


def run(config: Config) -> int:
    config.require("output", "export.format", "export.to")
    options = config.export
    output = open_output(storage.normalise(config.output))
    try:
        kind = FORMATS.get(options.format)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    plan = Plan.of(output, kind, options)
    folder = ExportFolder(storage.normalise(options.to))
    if "://" in folder.url and config.storage.create_only == storage.SERVER:
        storage.check_create_only(folder.url)
    for line in plan.notes():
        print(f"export: {line}")
    if folder.is_complete(plan):
        print(f"export: {folder.url} is already complete")
        return 0
    folder.start(plan)
    finished = folder.finished_parts()
    parts = write_parts(plan, folder, finished)
    if finished:
        print(f"export: {len(finished)} of {len(parts)} parts already existed")
    folder.finish(plan, parts)
    for line in folder.summary(plan, parts):
        print(f"export: {line}")
    return 0
