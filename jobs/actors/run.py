"""The code that all commands over shards share: run a worker over the shards, show progress, report failures."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from jobs.actors import cluster
from jobs.actors.pool import Named, ShardWorker, map_shards
from jobs.config import TokensConfig, WorkersConfig
from jobs.reports.progress import Progress
from pipeline.corpus.shards import Shard
from pipeline.errors import ShardError
from tokenizer.encoder import LatentEncoder

E = TypeVar("E", bound=LatentEncoder)  # Tokenizer, if the worker needs a codebook
SHOWN = 10
FIX_AND_RERUN = "fix the cause and rerun the same command"


@dataclass
class ShardResult:
    """The result of a shard. failure: why it could not be processed, or None."""

    shard: Shard
    failure: str | None = None

    def counts(self) -> dict[str, float]:
        """Amounts by name, which the progress line adds up."""
        return {}


class EncodeWorker(ShardWorker, Generic[E]):
    """Holds an encoder and processes shards with it. A failed shard gives a result, and the job continues.

    load: from a device to the encoder. Subclasses define `work`, and `result`, the class that it returns.
    """

    result: ClassVar[type[ShardResult]] = ShardResult

    def __init__(self, load: Callable[[str], E], options: TokensConfig, **resources: Any):
        super().__init__(**resources)
        self.encoder = load(self.device)
        self.options = options

    def work(self, shard: Shard) -> ShardResult:
        raise NotImplementedError

    def process(self, shard: Shard) -> ShardResult:
        try:
            return self.work(shard)
        except ShardError as error:
            return self.result(shard, failure=str(error))
        except Exception as error:
            return self.result(shard, failure=f"{shard.url}: {type(error).__name__}: {error}\n{traceback.format_exc()}")

    def failed(self, shard: Shard, reason: str) -> ShardResult:
        return self.result(shard, failure=f"{shard.url}: {reason}")


def run_shards(
    command: str,
    shards: Sequence[Named],
    worker: type[ShardWorker],
    settings: dict[str, Any],
    workers: WorkersConfig,
) -> Iterator[Any]:
    """Yields the worker's result of each shard as it finishes, and shows progress. See map_shards."""
    cluster.start()
    if not shards:
        return
    cluster.check_room(workers)
    progress = Progress(command, total=len(shards), unit="shards")
    for result in map_shards(shards, worker, settings, workers, job=command):
        progress.advance(**result.counts())
        yield result
    progress.close()


def print_failures(command: str, failures: Sequence[str]) -> None:
    """Prints the first line of the first failures, and how many more there are."""
    for failure in failures[:SHOWN]:
        print(f"{command}: failed shard: {failure.splitlines()[0]}")
    if len(failures) > SHOWN:
        print(f"{command}: ... and {len(failures) - SHOWN} more failed shards")
