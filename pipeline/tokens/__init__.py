"""Token shards: how they are laid out, committed, proven and read."""

from pipeline.tokens.commit import Commit, History
from pipeline.tokens.output import Output
from pipeline.tokens.quarantine import Quarantined
from pipeline.tokens.schema import Layout, TokenRow

__all__ = ["Commit", "History", "Layout", "Output", "Quarantined", "TokenDataset", "TokenRow"]


def __getattr__(name: str):
    # late: a TokenDataset is a torch IterableDataset where torch is installed, and importing torch takes seconds
    if name == "TokenDataset":
        from pipeline.tokens.dataset import TokenDataset

        return TokenDataset
    raise AttributeError(name)
