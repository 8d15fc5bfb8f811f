"""Every key of the configuration, with its type and default."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from pipeline.tokens.schema import ENCODINGS
from tokenizer.training.recipe import Recipe


class ConfigError(ValueError):
    """A mistake in the configuration or the command: exit code 2, one line, before Ray starts."""


@dataclass
class DataConfig:
    """shards: path, glob, braces, or a list. preprocess: the fields of the modality's Config."""

    shards: Any = ""
    preprocess: dict[str, Any] = field(default_factory=dict)


@dataclass
class ModelConfig:
    """net: {name, ...} and the fields of that net's Config."""

    modality: str = "image"
    net: dict[str, Any] = field(default_factory=lambda: {"name": "vqgan"})


@dataclass
class TrainConfig(Recipe):
    """The recipe, and what only a job over shards needs.

    accumulate: pieces that a worker's batch is cut into, for want of memory. ema: decay per step of the averaged
    weights that RUN/model then holds, 0 for none. evaluate_every: steps between reports with `pictures` fixed samples
    and their reconstructions; 0 makes that of the end alone. collapse_below: perplexity that is taken for a collapse
    after collapse_steps steps, 0 for never; collapse_stops ends the run then, else it is told.
    """

    shuffle_buffer: int = 1024  # samples
    decode_threads: int = 2
    log_every: int = 20  # steps
    checkpoint_every: int = 500  # steps
    keep_checkpoints: int = 2
    max_failures: int = 0  # restarts after a lost worker within one command
    accumulate: int = 1
    ema: float = 0.0
    compile: bool = False  # torch.compile for the nets
    profile: bool = False  # tell at the end where the time went
    evaluate_every: int = 0
    pictures: int = 8
    collapse_below: float = 0.0
    collapse_steps: int = 500
    collapse_stops: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("decode_threads", "log_every", "checkpoint_every", "accumulate", "pictures", "collapse_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("evaluate_every", "collapse_below"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be 0 (off) or more")
        if not 0 <= self.ema < 1:
            raise ValueError(f"train.ema is {self.ema}; it must lie in 0..1, below 1 (0 for none)")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"train.accumulate is {self.accumulate}; it must divide train.batch_size, {self.batch_size}"
            )


@dataclass
class WorkersConfig:
    """count: training ranks, or actors of the other jobs; 0 is one rank, or as many actors as there is room for.

    cpus: per worker, and its torch threads. 0 gives ranks an even share of the machine, and actors one each: not
    their share, since the last bit of a sum depends on the threads, and tokens must not depend on the workers.
    stall_timeout_s: an actor whose shard does not get on for so long is killed, and its shard given to another.
    """

    count: int = 0
    cpus: float = 0
    gpus: float = 0
    stall_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.stall_timeout_s <= 0:
            raise ValueError(f"workers.stall_timeout_s is {self.stall_timeout_s}; it must be above 0 seconds")
        for name in ("count", "cpus", "gpus"):
            if getattr(self, name) < 0:
                raise ValueError(f"workers.{name} is {getattr(self, name)}; it must be 0 or more")


@dataclass
class CodebookConfig:
    """size: codes, or a list of them; empty for the quantizer's own. max_latents: sampled from the whole corpus.

    full: k-means goes over every latent of the corpus, streamed from the cache; the sample is where it starts.
    cache: keep all latents at RUN/latents, and read them from there where they are; implied by full.
    warm_start: of several sizes, each starts from the codes of the one below, and not afresh: sooner done,
    and with an error that may be some percent higher.
    settings: of the quantizer, that only the making of the codebook reads, such as {balance: 1}; they are added to the
    tokenizer's name.
    """

    size: Any = None
    settings: dict[str, Any] = field(default_factory=dict)
    max_latents: int = 1_000_000
    seed: int = 0
    full: bool = False
    cache: bool = False
    warm_start: bool = False

    def __post_init__(self) -> None:
        if self.max_latents < 1:
            raise ValueError(f"codebook.max_latents is {self.max_latents}; it must be 1 or more")


@dataclass
class CompareConfig:
    """methods: label -> YAML file, or {file, quantizer, train} whose settings go over those of the file.

    sizes and dims: each method is trained at each size, dims[size] channels wide where its width is free. Every
    picture is held in memory, at most max_samples of them; codebooks are made from at most max_latents latents.
    """

    heldout: Any = ""  # shards to evaluate on
    others: dict[str, Any] = field(default_factory=dict)  # name -> further shards, e.g. of another domain
    methods: dict[str, Any] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=lambda: [1024])
    dims: dict[int, int] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    max_samples: int = 100_000
    max_latents: int = 262_144
    eval_batch_size: int = 64  # samples; the perplexity per batch depends on it
    pictures: int = 8


@dataclass
class TokensConfig:
    """encoding: list or packed. passthrough: members of the samples that become columns.

    batch_budget: megapixels of pictures or seconds of sound in one batch, padding included; 0 is the modality's own.
    latents: a cache (RUN/latents) to make the tokens from, instead of the samples themselves.
    max_bad_fraction: more quarantined than this ends in exit code 4.
    """

    encoding: str = "list"
    passthrough: list[str] = field(default_factory=list)
    batch_budget: float = 0.0
    decode_threads: int = 2
    latents: str = ""
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            raise ValueError(f"tokens.encoding is {self.encoding!r}; choose one of: {', '.join(ENCODINGS)}")


@dataclass
class AuditConfig:
    """rows: how many committed rows are tokenized again; seed: which ones."""

    rows: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"audit.rows is {self.rows}; it must be 1 or more")


@dataclass
class StorageConfig:
    """options: what fsspec's file systems are given, by protocol: {s3: {endpoint_url: ..., profile: ...}}. What the
    usual AWS_* variables say need not stand here, and keys better not; no artifact holds these options.

    create_only: who keeps a shard from being written twice. server: conditional writes, probed before the first one.
    checked: we look first, for servers that ignore the condition; then one command at a time may write to an output.
    """

    options: dict[str, Any] = field(default_factory=dict)
    create_only: str = "server"

    def __post_init__(self) -> None:
        if self.create_only not in ("server", "checked"):
            raise ValueError(f"storage.create_only is {self.create_only!r}; choose one of: server, checked")


@dataclass
class Config:
    """Every key that a command can be given; each command uses some of them."""

    run: str = ""
    storage: StorageConfig = field(default_factory=StorageConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    quantizer: dict[str, Any] = field(default_factory=lambda: {"name": "vp_vae"})
    train: TrainConfig = field(default_factory=TrainConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    metrics: dict[str, Any] = field(default_factory=dict)  # settings of the modality's metrics, e.g. perceptual
    compare: CompareConfig = field(default_factory=CompareConfig)
    tokenizer: str = ""  # a frozen tokenizer; the run's only one if empty
    output: str = ""  # of tokenize
    deep: bool = False  # verify: read every byte of the output, and the input shards again
    json: bool = False  # status: print JSON
    audit: AuditConfig = field(default_factory=AuditConfig)
    keys: list[str] = field(default_factory=list)  # decode: these samples; the first `limit` if empty
    limit: int = 16  # decode, and pictures in the report of evaluate
    to: str = ""  # decode: the folder of pictures
    source: str = ""  # pack: a folder, .parquet or .csv
    shards: str = ""  # pack: where to, e.g. corpus/photos-%06d.tar
    samples_per_shard: int = 1000
    shuffle_seed: int = -1  # pack: -1 keeps the order of the source

    def to_dict(self) -> dict[str, Any]:
        """For artifacts: without `storage`, which may hold keys."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "storage"}

    def require(self, *keys: str) -> None:
        """Raises ConfigError that names the first of these keys that is empty."""
        for key in keys:
            value: Any = self
            for part in key.split("."):
                value = getattr(value, part)
            if value in ("", None, [], {}):
                raise ConfigError(f"{key} is not set; give {key}=... on the command line or in the YAML file")
