"""Writes the parts of an export, in several processes."""

from jobs.exporting.folder import ExportFolder
from jobs.exporting.format import Format, Part
from jobs.exporting.plan import Plan
from jobs.exporting.rows import read_rows
from jobs.packing.shards import in_processes, num_workers
from jobs.reports.progress import counted
from pipeline.tokens import Commit, Output


def write_parts(plan: Plan, folder: ExportFolder, finished: dict[int, Part]) -> list[Part]:
    """Writes the parts that are not finished. Returns all in their order."""
    todo = [number for number in range(len(plan.entries)) if number not in finished]
    jobs = [(plan.output, plan.entries[number], plan.format, folder, number) for number in todo]
    workers = min(num_workers(plan.format.options.workers), len(jobs))
    if workers > 1:
        written = in_processes(write_part, iter(jobs), workers, "lower export.workers")
    else:
        written = (write_part(*job) for job in jobs)
    made = list(counted("export", written, "parts", len(jobs)))
    parts = {**finished, **{part.number: part for part in made}}
    return [parts[number] for number in range(len(plan.entries))]


def write_part(output: Output, entry: Commit, kind: Format, folder: ExportFolder, number: int) -> Part:
    """Raises BrokenOutput and OutputMismatch like `read_rows`."""
    rows = read_rows(output, entry)
    return folder.write_part(number, entry.name, len(rows), len(rows.values), kind.files(rows, number))
