"""Token shards: their schema, and how they are committed, verified and read."""

from typing import Any

from pipeline.tokens.commit import Commit, CommittedShard
from pipeline.tokens.output import Output
from pipeline.tokens.quarantine import Quarantined
from pipeline.tokens.rows import collate
from pipeline.tokens.schema import ShardLayout, TokenRow
from pipeline.tokens.writer import commit_retry, commit_shard

__all__ = [
    "Commit",
    "CommittedShard",
    "Output",
    "Quarantined",
    "ShardLayout",
    "TokenDataset",
    "TokenRow",
    "collate",
    "commit_retry",
    "commit_shard",
]


def __getattr__(name: str) -> Any:
    # imported on first use: TokenDataset subclasses torch's IterableDataset, and importing torch takes seconds
    if name == "TokenDataset":
        from pipeline.tokens.dataset import TokenDataset

        return TokenDataset
    raise AttributeError(name)
