"""What several commands do with an output: open it, and say at the end whether it is complete."""

from jobs.config import Config, ConfigError
from pipeline.tokens import CommittedShard, Output
from pipeline.tokens.checks import damaged_files


def open_output(url: str) -> Output:
    """Raises ConfigError if there is no output."""
    try:
        return Output.open(url)
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from error


def exit_code(
    command: str,
    output: Output,
    committed: list[CommittedShard],
    counts: tuple[int, int],
    config: Config,
    *,
    then: str = "",
) -> int:
    """Prints the last line of a command in which no shard failed, and returns its exit code: 0, 3 or 4.

    counts: tokenized and quarantined samples that tokens.max_bad_fraction applies to. then: what to do after a repair.
    """
    if damaged := damaged_files(output, committed):
        print(
            f"{command}: incomplete: {len(damaged)} files of committed shards are missing or damaged, such as "
            f"{damaged[0]}; run `tokenmill verify verify.repair=true output={output.url}`{then}"
        )
        return 3
    tokenized, quarantined = counts
    allowed = config.tokens.max_bad_fraction
    if quarantined > allowed * max(1, tokenized + quarantined):
        print(f"{command}: done, but {quarantined} quarantined samples exceed tokens.max_bad_fraction={allowed}")
        return 4
    print(f"{command}: done")
    return 0
