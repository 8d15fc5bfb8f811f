"""What an export consists of."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jobs.config import ConfigError
from jobs.config.schema import ExportConfig
from jobs.exporting.format import Format
from pipeline.errors import OutputMismatch
from pipeline.tokens import Commit, Output


@dataclass(frozen=True)
class Plan:
    """entries: the commits with rows, one part each, in the order of their names."""

    output: Output
    entries: list[Commit]
    format: Format
    num_quarantined: int
    num_missing: int  # input shards that are not tokenized

    @classmethod
    def of(cls, output: Output, kind: type[Format], options: ExportConfig) -> "Plan":
        """Raises ConfigError for an output without rows or with latents, and for settings that the format does not
        have; OutputMismatch if another tokenizer made a commit."""
        layout = output.layout
        if layout.holds_latents:
            raise ConfigError(f"{output.url} holds latents, not tokens; give an output of `tokenmill tokenize`")
        shards = output.committed_shards()
        entries = [entry for shard in shards for entry in shard.entries if entry.num_rows]
        if not entries:
            raise ConfigError(f"{output.url} holds no rows; run `tokenmill tokenize` first")
        for entry in entries:
            if entry.tokenizer_id != layout.tokenizer_id:
                raise OutputMismatch(
                    f"{output.entry_url(entry.name)} is of tokenizer {entry.tokenizer_id}, but {output.url} of "
                    f"{layout.tokenizer_id}; run `tokenmill verify`"
                )
        num_missing = len({shard.name for shard in output.inputs()} - {shard.first.name for shard in shards})
        num_quarantined = sum(shard.num_quarantined for shard in shards)
        return cls(output, entries, kind(options, layout), num_quarantined, num_missing)

    def notes(self) -> Iterator[str]:
        """What a user should know before the export."""
        if self.num_missing:
            yield f"{self.num_missing} input shards are not tokenized yet; the export lacks them"
        if self.num_quarantined:
            yield f"{self.num_quarantined} samples are in quarantine; the export lacks them"
        if self.format.dtypes and not self.format.options.dtype:
            yield f"tokens go up to {self.format.vocabulary_size - 1}, so they are written as {self.format.dtype.name}"

    def identity(self) -> dict[str, Any]:
        """What two exports into one folder must agree on."""
        layout, options = self.output.layout, self.format.options
        commits = "".join(f"{entry.name} {entry.tokens_sha256}\n" for entry in self.entries)
        return {
            "format": self.format.name,
            "dtype": self.format.dtype.name,
            "bos": options.bos,
            "eos": options.eos,
            "offset": options.offset,
            "tokenizer_id": layout.tokenizer_id,
            "codebook_id": layout.codebook_id,
            "codebook_size": layout.codebook_size,
            "index_order": layout.index_order,
            "source_id": hashlib.sha256(commits.encode()).hexdigest(),
        }
