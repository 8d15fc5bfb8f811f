"""Finds shards that hold the same samples, and keys that occur in several shards."""

import hashlib
from collections.abc import Iterator

import numpy as np

from pipeline.corpus.shards import Shard
from pipeline.tokens.commit import NEW, CommittedShard, shard_name


def find_twins(
    shards: list[CommittedShard], hashes: dict[str, str | None], lists: dict[str, list[Shard]]
) -> Iterator[str]:
    """A message for each shard with the samples of another one that a different run was given.

    hashes: samples_sha256 by name. Two such shards of one list are the user's choice, and so are those that were
    committed with tokens.same_names=new.
    """
    listed = lists_by_url(lists)
    by_hash: dict[str, CommittedShard] = {}
    for shard in sorted(shards, key=lambda shard: shard.first.committed_at):
        digest = hashes[shard_name(shard.first.name)]
        if digest is None or shard.first.same_names == NEW:
            continue
        other = by_hash.setdefault(digest, shard)
        url, first = shard.first.source_shard, other.first.source_shard
        if listed.get(url) != listed.get(first):
            yield (
                f"manifest/{shard.first.name}.json: {url} holds the same samples as {first}: one shard under two "
                f"paths? Withdraw the list of one, or its rows: verify.withdraw={shard.first.name}"
            )


def lists_by_url(lists: dict[str, list[Shard]]) -> dict[str, set[str]]:
    """The ids of the lists that each shard is in."""
    listed: dict[str, set[str]] = {}
    for list_id, shards in lists.items():
        for shard in shards:
            listed.setdefault(shard.url, set()).add(list_id)
    return listed


class KeyCounter:
    """Counts keys over all shards, in 8 bytes per sample: keys whose hashes are equal count as one."""

    def __init__(self) -> None:
        self.urls: list[str] = []
        self.hashes: list[np.ndarray] = []

    def add(self, url: str, keys: list[str]) -> None:
        digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
        self.urls.append(url)
        self.hashes.append(np.unique(np.frombuffer(digests, np.uint64)))

    def repeats(self) -> list[str]:
        """A note if keys occur in several shards, which names two of them; else nothing."""
        if not self.hashes:
            return []
        values, counts = np.unique(np.concatenate(self.hashes), return_counts=True)
        repeated = values[counts > 1]
        if not len(repeated):
            return []
        first, second = [url for url, keys in zip(self.urls, self.hashes, strict=True) if repeated[0] in keys][:2]
        return [
            f"{len(repeated)} keys occur in more than one shard, such as in {first} and {second}. That is right if "
            "each shard numbers its own samples; otherwise these samples are there twice"
        ]
