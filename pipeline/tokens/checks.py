"""The shallow check of one shard: its manifest entries, and the size and footer of its files."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import pyarrow.parquet as pq

from pipeline.corpus.shards import Shard
from pipeline.errors import StorageError
from pipeline.tokens.commit import Commit, CommittedShard, shard_name
from pipeline.tokens.footer import column_ranges, footer_fields, read_footer
from pipeline.tokens.output import Output
from pipeline.tokens.quarantine import QUARANTINE_SCHEMA

FOOTER_IDS = (
    "tokenizer_id",
    "codebook_id",
    "codebook_size",
    "token_dtype",
    "encoding",
    "schema_version",
    "index_order",
    "modality",
    "preprocessing",
    "views",
)
MISSING = "the file is missing"
WRONG_COLUMNS = "its columns are not those of the dataset"


@dataclass
class CheckResult:
    """The result for one shard.

    problems: of its files, which `repair` solves. input_problems: of the input shard. foreign: an id, a footer or the
    columns are not those of dataset.json. The deep check also fills rows and quarantined, (source_index, key) of each
    sample, and samples_sha256.
    """

    name: str
    problems: list[str] = field(default_factory=list)
    input_problems: list[str] = field(default_factory=list)
    foreign: bool = False
    num_without_ranges: int = 0
    rows: list[tuple[int, str]] = field(default_factory=list)
    quarantined: list[tuple[int, str]] = field(default_factory=list)
    samples_sha256: str | None = None

    def add(self, where: str, problems: Iterable[str]) -> None:
        for what in problems:  # one by one: an error may end them, and those before it count
            self.problems.append(f"{where}: {what}")


def check_shallow(output: Output, sizes: dict[str, dict[str, int]], shard: CommittedShard) -> CheckResult:
    """sizes: see `Output.file_sizes`."""
    result = CheckResult(shard_name(shard.first.name), samples_sha256=shard.first.samples_sha256)
    check_entries(output, shard, result)
    for entry in shard.entries:
        for folder in ("tokens", "quarantine") if entry.quarantine_sha256 else ("tokens",):
            where = f"{folder}/{entry.name}.parquet"
            try:
                result.add(where, _check_file(output, sizes, folder, shard, entry, result))
            except (StorageError, PermissionError):
                raise  # they say nothing about the output
            except (OSError, ValueError) as error:
                result.add(where, [str(error)])
    return result


def damaged_files(output: Output, shards: list[CommittedShard]) -> list[str]:
    """What the entries and the listings alone show: missing files, files of another size, counts that disagree."""
    sizes = output.file_sizes()
    problems = [what for shard in shards for what in _check_entries(output, shard)]
    for entry in (entry for shard in shards for entry in shard.entries):
        for folder in ("tokens", "quarantine") if entry.quarantine_sha256 else ("tokens",):
            found = _check_size(sizes, folder, entry)
            problems += [f"{folder}/{entry.name}.parquet: {what}" for what in found]
    return problems


def _check_size(sizes: dict[str, dict[str, int]], folder: str, entry: Commit) -> Iterator[str]:
    expected = entry.tokens_num_bytes if folder == "tokens" else entry.quarantine_num_bytes
    found = sizes[folder].get(entry.name)
    if found is None:
        yield MISSING
    elif expected not in (None, found):
        yield f"the file has {found} bytes, the manifest says {expected}"


# -- manifest entries ---------------------------------------------------------------------------------------------


def check_entries(output: Output, shard: CommittedShard, result: CheckResult) -> None:
    """Checks ids and counts, and that each retry continues the entry before it."""
    result.problems += _check_entries(output, shard)
    result.foreign |= any(tuple(_check_ids(output, entry)) for entry in shard.entries)


def _check_entries(output: Output, shard: CommittedShard) -> Iterator[str]:
    settled = [index for entry in shard.entries for index in entry.settled]
    if len(set(settled)) != len(settled):
        yield f"{shard.first.name}: two retries recovered the same sample; lost or doubled"
    for number, entry in enumerate(shard.entries):
        for what in (*_check_ids(output, entry), *_check_name(entry), *_check_counts(output, entry)):
            yield f"manifest/{entry.name}.json: {what}"
        if entry.retry != number:
            yield f"manifest/{entry.name}.json: the entry before this retry is missing"
        elif number and entry.num_samples != shard.entries[number - 1].num_quarantined:
            yield (
                f"manifest/{entry.name}.json: retried {entry.num_samples} samples, but "
                f"{shard.entries[number - 1].num_quarantined} were in quarantine"
            )


def _check_ids(output: Output, entry: Commit) -> Iterator[str]:
    expected = output.layout.to_dict()
    for name in ("tokenizer_id", "codebook_id"):
        if getattr(entry, name) != expected[name]:
            yield f"{name} {getattr(entry, name)} is not the dataset's {expected[name]}"


def _check_name(entry: Commit) -> Iterator[str]:
    if shard_name(entry.name) != Shard(entry.source_shard, None).name:
        yield f"its name does not belong to its shard {entry.source_shard}"


def _check_counts(output: Output, entry: Commit) -> Iterator[str]:
    per_sample = output.layout.rows_per_sample
    if entry.num_rows + per_sample * entry.num_quarantined != per_sample * entry.num_samples:
        views = f" in {per_sample} views each" if output.layout.views else ""
        samples = f"{entry.num_samples} samples{views}"
        yield f"{entry.num_rows} rows and {entry.num_quarantined} quarantined are not {samples}"
    if bool(entry.quarantine_sha256) != bool(entry.num_quarantined):
        yield f"{entry.num_quarantined} quarantined, but the checksum of their file is {entry.quarantine_sha256}"
    if entry.reasons and sum(entry.reasons.values()) != entry.num_quarantined:
        yield f"reasons for {sum(entry.reasons.values())} samples, but {entry.num_quarantined} quarantined"
    if entry.retry and not per_sample * len(set(entry.settled)) == per_sample * len(entry.settled) == entry.num_rows:
        yield f"{entry.num_rows} rows, but it settled {len(set(entry.settled))} samples"


# -- sizes and footers --------------------------------------------------------------------------------------------


def _check_file(
    output: Output,
    sizes: dict[str, dict[str, int]],
    folder: str,
    shard: CommittedShard,
    entry: Commit,
    result: CheckResult,
) -> Iterator[str]:
    yield from _check_size(sizes, folder, entry)
    num_bytes = sizes[folder].get(entry.name)
    if num_bytes is None:
        return
    if folder == "quarantine":
        metadata = read_footer(output.quarantine_url(entry.name), num_bytes)
        yield from check_quarantine_footer(entry, metadata)
    else:
        metadata = read_footer(output.tokens_url(entry.name), num_bytes)
        yield from check_footer(output, entry, metadata, result)
    ranges = column_ranges(metadata, "source_index")
    if ranges is None:
        result.num_without_ranges += 1
        return
    per_sample = output.layout.rows_per_sample if folder == "tokens" else 1
    yield from _check_ranges(ranges, shard.first.num_samples, per_sample)
    ends = [ranges[0][1], ranges[-1][2]] if ranges else []
    if folder == "tokens" and entry.retry and ends != [*entry.settled[:1], *entry.settled[-1:]]:
        yield f"rows of samples {ends[:1]} to {ends[1:]}, which are not those in the manifest"


def check_footer(output: Output, entry: Commit, metadata: pq.FileMetaData, result: CheckResult) -> Iterator[str]:
    """Checks the footer of a token file against dataset.json and the manifest entry."""
    layout, found = output.layout.footer(), footer_fields(metadata)
    foreign = [name for name in FOOTER_IDS if found.get(name) != layout.get(name)]
    yield from (f"footer says {name} {found.get(name)}, the dataset {layout.get(name)}" for name in foreign)
    expected = {"source_shard": entry.source_shard, "num_tokens": entry.num_tokens}
    expected |= {"source_num_bytes": entry.source_num_bytes, "source_version": entry.source_version}
    for name, value in expected.items():
        if found.get(name, str(value)) != str(value):  # files of older versions lack some
            yield f"footer says {name} {found[name]}, the manifest {value}"
    if metadata.num_rows != entry.num_rows:
        yield f"{metadata.num_rows} rows, the manifest says {entry.num_rows}"
    same_columns = metadata.schema.to_arrow_schema().equals(output.layout.schema(entry.source_shard))
    if not same_columns:
        yield WRONG_COLUMNS
    result.foreign |= bool(foreign) or not same_columns


def check_quarantine_footer(entry: Commit, metadata: pq.FileMetaData) -> Iterator[str]:
    if metadata.num_rows != entry.num_quarantined:
        yield f"{metadata.num_rows} rows, the manifest says {entry.num_quarantined}"
    if not metadata.schema.to_arrow_schema().equals(QUARANTINE_SCHEMA):
        yield "its columns are not those of a quarantine file"


def _check_ranges(ranges: list[tuple[int, int, int]], num_samples: int, per_sample: int = 1) -> Iterator[str]:
    """Row groups as (rows, min, max source_index): each range must fit its rows, and ranges must not overlap.

    per_sample: rows of a sample. If there are several, two row groups may share one sample.
    """
    end = -1
    for rows, low, high in ranges:
        overlaps = low < end if per_sample > 1 else low <= end
        if overlaps or high >= num_samples or (high - low + 1) * per_sample < rows:
            yield f"{rows} rows of samples {low}..{high}, after {end}, of {num_samples} samples; lost or doubled"
        end = max(end, high)
