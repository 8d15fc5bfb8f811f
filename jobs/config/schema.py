"""Every configuration key, with its type, default, description and the commands that use it.

`tokenmill COMMAND --help` and docs/reference/configuration.md print these descriptions.
"""
# ruff: noqa: RUF009  # `key` returns a dataclasses.field

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jobs.config.written import with_written
from pipeline.tokens.commit import NEW, REFUSE
from pipeline.tokens.schema import ENCODINGS
from pipeline.tokens.views import MAX_VIEWS, Views

if TYPE_CHECKING:
    from tokenizer.training.recipe import Recipe  # imports torch, and --help should not wait for that


class ConfigError(ValueError):
    """A mistake in the configuration or the command: exit code 2 and one line, before Ray starts."""


def key(default: Any, description: str, commands: tuple[str, ...] = ()) -> Any:
    """A field with a description. default: a value, or the dataclass of a section. commands: those that use it; none
    means those of the section."""
    metadata = {"description": description, "commands": commands}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


TRAINING = ("train", "compare")
WITH_TOKENIZER = ("tokenize", "evaluate", "audit", "retry", "decode", "view")
DECODING = ("codebook", "tokenize", "evaluate", "audit", "retry")
POOLS = ("codebook", "tokenize", "evaluate", "audit", "retry")
ALL = (
    "pack",
    "train",
    "codebook",
    "tokenize",
    "status",
    "verify",
    "audit",
    "retry",
    "decode",
    "compare",
    "evaluate",
    "export",
    "import",
    "view",
)


@dataclass
class DataConfig:
    shards: Any = key(
        "", "WebDataset shards: a path or URL, a glob, braces such as {000..099}, or a list", (*TRAINING, *POOLS[:3])
    )
    preprocess: dict[str, Any] = key(
        {}, "settings of the modality, such as short_side or sample_rate", ("pack", *TRAINING, "codebook")
    )
    member: str = key(
        "",
        "the member to read where a sample has several images or sounds, such as jpg or left.jpg; empty: the only one",
        (*TRAINING, *POOLS[:3]),
    )

    def __post_init__(self) -> None:
        self.member = self.member.lower().removeprefix(".")


@dataclass
class ModelConfig:
    modality: str = key("image", "image or audio", ("pack", *TRAINING))
    net: dict[str, Any] = key({"name": "vqgan"}, "the autoencoder: its name, and the settings of that net", TRAINING)


@dataclass
class DiscriminatorConfig:
    weight: float = key(0.0, "weight of the adversarial loss relative to all other losses; 0 trains no discriminator")
    start_step: int = key(5000, "steps before the discriminator starts")
    channels: int = key(64, "channels of its first convolution")
    layers: int = key(3, "number of times it halves height and width")
    lr: float = key(1e-4, "its learning rate, which stays constant")


@dataclass
class CollapseConfig:
    """The codebook has collapsed when its perplexity stays below a limit."""

    perplexity: float = key(0.0, "warn when the codebook perplexity stays below this; 0 never warns")
    patience: int = key(500, "steps that the perplexity must stay below the limit")
    stop: bool = key(False, "stop the run then, instead of only logging a warning")

    def __post_init__(self) -> None:
        _check_minimum("train.collapse", self, 0, "perplexity", unit=" (off)")
        _check_minimum("train.collapse", self, 1, "patience")


@dataclass
class TrainConfig:
    steps: int = key(10_000, "optimizer steps", TRAINING)
    batch_size: int = key(32, "samples per worker and step", TRAINING)
    crop_size: int = key(128, "size of the random crops: side in pixels, or length in audio samples", TRAINING)
    lr: float = key(1e-3, "learning rate after the warm-up", TRAINING)
    lr_min: float = key(0.0, "learning rate at the last step, the end of the cosine", TRAINING)
    warmup_steps: int = key(100, "steps of linear warm-up", TRAINING)
    weight_decay: float = key(1e-4, "weight decay of AdamW", TRAINING)
    betas: list[float] = key([0.9, 0.95], "the two betas of AdamW", TRAINING)
    grad_clip: float = key(1.0, "largest norm of the gradient, above 0; larger gradients are scaled down", TRAINING)
    loss_weights: dict[str, float] = key(
        {}, "weights by loss name, over the defaults of modality and quantizer", TRAINING
    )
    losses: dict[str, Any] = key({}, "settings of the modality's losses, such as perceptual", TRAINING)
    discriminator: DiscriminatorConfig = key(DiscriminatorConfig, "a patch discriminator, for images only", TRAINING)
    precision: str = key("fp32", "fp32, or bf16 for autocast; the quantizer always computes in fp32", TRAINING)
    seed: int = key(0, "seed of weights, sample order, crops and noise", TRAINING)
    shuffle_buffer: int = key(1024, "samples in the shuffle buffer")
    decode_threads: int = key(2, "threads per worker that decode samples")
    log_every: int = key(20, "steps between log lines")
    checkpoint_every: int = key(500, "steps between checkpoints")
    keep_checkpoints: int = key(2, "number of checkpoints to keep")
    max_failures: int = key(0, "restarts after a lost worker within one command")
    grad_accum_steps: int = key(1, "parts to split a worker's batch into, to save memory; must divide train.batch_size")
    ema: float = key(0.0, "decay per step of the averaged weights that RUN/model then holds; 0 keeps no average")
    compile: bool = key(False, "compile the nets with torch.compile")
    profile: bool = key(False, "print at the end how the time was spent")
    reconstruct_every: int = key(0, "steps between reports with reconstructions; 0 reports only at the end")
    num_examples: int = key(8, "fixed samples that these reports reconstruct")
    collapse: CollapseConfig = key(CollapseConfig, "what to do when the codebook collapses")

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "crop_size", "decode_threads", "log_every", "checkpoint_every")
        _check_minimum("train", self, 1, *positive, "grad_accum_steps", "num_examples")
        _check_minimum("train", self, 0, "reconstruct_every", unit=" (off)")
        _check_minimum("train", self, 0, "seed", "lr", "lr_min", "warmup_steps", "weight_decay", "shuffle_buffer")
        _check_minimum("train", self, 1, "keep_checkpoints")
        _check_minimum("train", self, -1, "max_failures", unit=" (without limit)")
        if not 0 <= self.ema < 1:
            raise ValueError(f"train.ema is {self.ema}; it must be at least 0 (no average) and below 1")
        if self.batch_size % self.grad_accum_steps:
            raise ValueError(
                f"train.grad_accum_steps is {self.grad_accum_steps}; it must divide train.batch_size, {self.batch_size}"
            )
        self.recipe()

    def recipe(self) -> "Recipe":
        """The part that does not depend on shards. Raises ValueError. Recipe still calls crop_size `segment`: the ids
        and result files of comparisons hold that name."""
        from tokenizer.training.recipe import Recipe

        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(Recipe) if f.name != "segment"}
        given["discriminator"] = dataclasses.replace(Recipe().discriminator, **dataclasses.asdict(self.discriminator))
        return Recipe(**given, segment=self.crop_size)


@dataclass
class WorkersConfig:
    """A training worker with cpus=0 gets an even share of the machine. Workers of the other commands get one CPU each:
    the last bit of a sum depends on the number of threads, and tokens must not depend on the number of workers."""

    count: int = key(
        0, "number of workers; 0 is 1 for training, and as many as fit for other commands", ("train", *POOLS)
    )
    cpus: float = key(0, "CPUs and torch threads per worker; 0 is an even share for training, else 1")
    gpus: float = key(0, "GPUs per worker; a fraction shares a GPU between workers")
    stall_timeout_s: float = key(
        600.0, "seconds without progress after which a worker is killed and its shard restarted", POOLS
    )

    wait_s: float = key(3600.0, "seconds to wait for a cluster with room for the first worker, before giving up")

    def __post_init__(self) -> None:
        for name in ("stall_timeout_s", "wait_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"workers.{name} is {getattr(self, name)}; it must be above 0 seconds")
        _check_minimum("workers", self, 0, "count", "cpus", "gpus")


@dataclass
class CodebookConfig:
    size: Any = key(None, "number of codes, or a list of numbers; empty takes the quantizer's own")
    settings: dict[str, Any] = key(
        {}, "quantizer settings for this codebook only, such as {balance: 1}; added to the tokenizer's name"
    )
    max_latents: int = key(1_000_000, "latents to sample from the whole corpus")
    seed: int = key(0, "seed of that sample and of k-means")
    full: bool = key(False, "run k-means on all latents of the corpus instead of a sample")
    cache: bool = key(False, "keep all latents in RUN/latents and read them from there; implied by full")
    warm_start: bool = key(
        False, "with several sizes, start each from the next smaller one: faster, with a slightly larger error"
    )

    def __post_init__(self) -> None:
        _check_minimum("codebook", self, 1, "max_latents")
        _check_minimum("codebook", self, 0, "seed")


@dataclass
class CompareConfig:
    """All samples are held in memory."""

    heldout: Any = key("", "shards to evaluate on, like data.shards")
    others: dict[str, Any] = key({}, "more shards to evaluate on, by name, for example of another domain")
    methods: dict[str, Any] = key(
        {}, "label: YAML file, or label: {file, quantizer, train} with settings that override the file"
    )
    sizes: list[int] = key([1024], "codebook sizes; each method is trained at each size")
    dims: dict[int, int] = key({}, "latent channels by codebook size, for methods whose dim is free")
    seeds: list[int] = key([0], "seeds; each method is trained with each seed")
    max_samples: int = key(100_000, "samples to load from each set of shards at most")
    max_latents: int = key(262_144, "latents that a codebook is made from at most")
    eval_batch_size: int = key(64, "samples per evaluation batch; the perplexity per batch depends on it")
    num_examples: int = key(8, "samples whose reconstructions the report shows")

    def __post_init__(self) -> None:
        _check_minimum("compare", self, 1, "max_samples", "eval_batch_size")
        _check_minimum("compare", self, 0, "max_latents", "num_examples")
        for name, smallest in (("seeds", 0), ("sizes", 2)):
            if wrong := [value for value in getattr(self, name) if value < smallest]:
                raise ValueError(f"compare.{name} holds {wrong[0]}; each must be {smallest} or more")


@dataclass
class ViewsConfig:
    """Random crops of each sample, with one row for each. Without a count there are none."""

    count: int = key(0, "views of each sample; 0 makes one row of the whole sample")
    crop: float = key(0.0, "side of the square crops in pixels, or seconds of audio")
    flip: bool = key(False, "mirror half of the views, for pictures")
    seed: int = key(0, "seed of the crops, which depend on it, on the key of the sample and on the view alone")

    def __post_init__(self) -> None:
        _check_minimum("tokens.views", self, 0, "count", "crop", "seed")
        if self.count > MAX_VIEWS:
            raise ValueError(f"tokens.views.count is {self.count}; it must be {MAX_VIEWS} or less")
        if self.count and not self.crop:
            raise ValueError("tokens.views.crop is not set; give the size of the views, such as tokens.views.crop=256")
        if not self.count and (self.crop or self.flip or self.seed):
            raise ValueError("tokens.views.count is not set; give the number of views, such as tokens.views.count=10")

    def chosen(self) -> Views | None:
        """None without a count. A whole crop is an integer, so that it is written as one."""
        crop = int(self.crop) if self.crop == int(self.crop) else self.crop
        return Views(self.count, crop, self.flip, self.seed) if self.count else None


@dataclass
class TokensConfig:
    encoding: str = key("list", "column type of the tokens: list or packed", ("tokenize",))
    passthrough: list[str] = key([], "members of the samples to copy into columns, such as txt", ("tokenize",))
    batch_budget: float = key(
        0.0, "megapixels or seconds of audio per batch, padding included; 0 is the modality's default"
    )
    decode_threads: int = key(2, "threads per worker that decode samples")
    same_names: str = key(
        REFUSE,
        "what to do with a new shard that looks like an earlier one under another path: refuse, or take it as new",
        ("tokenize", "codebook"),
    )
    max_pixels: int = key(0, "quarantine larger pictures; 0 is the tokenizer's own limit, data.preprocess.max_pixels")
    max_seconds: float = key(
        0.0, "quarantine longer clips; 0 is the tokenizer's own limit, data.preprocess.max_seconds"
    )
    max_sample_bytes: int = key(0, "quarantine samples whose files are larger together; 0 is no limit")
    latents: str = key("", "a latent cache (RUN/latents) to make tokens from, instead of the samples", ("tokenize",))
    views: ViewsConfig = key(ViewsConfig, "several crops of each sample", ("tokenize",))
    max_bad_fraction: float = key(
        0.01, "share of quarantined samples, 0 to 1, above which the command exits with code 4", ("tokenize", "retry")
    )

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            raise ValueError(f"tokens.encoding is {self.encoding!r}; choose one of: {', '.join(ENCODINGS)}")
        if self.same_names not in (REFUSE, NEW):
            raise ValueError(f"tokens.same_names is {self.same_names!r}; choose one of: {REFUSE}, {NEW}")
        _check_minimum("tokens", self, 0, "max_pixels", "max_seconds", "max_sample_bytes", "batch_budget")
        _check_minimum("tokens", self, 1, "decode_threads")
        if self.views.count and self.latents:
            raise ValueError(
                "tokens.latents holds latents of whole samples, so it has no views; leave out tokens.latents or "
                "tokens.views"
            )
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"tokens.max_bad_fraction is {self.max_bad_fraction}; it must be from 0 to 1")

    def limits(self) -> dict[str, float]:
        """The limits of a modality that are set, by their names there."""
        given = {"max_pixels": self.max_pixels, "max_seconds": self.max_seconds}
        return {name: limit for name, limit in given.items() if limit}


@dataclass
class EvaluateConfig:
    num_examples: int = key(16, "samples that the report shows, besides the best and the worst ones; 0 shows none")

    def __post_init__(self) -> None:
        _check_minimum("evaluate", self, 0, "num_examples")


@dataclass
class AuditConfig:
    rows: int = key(100, "number of committed rows to tokenize again")
    seed: int = key(0, "seed that selects the rows")

    def __post_init__(self) -> None:
        _check_minimum("audit", self, 1, "rows")
        _check_minimum("audit", self, 0, "seed")


@dataclass
class PackConfig:
    source: str = key("", "a folder, or a Parquet or CSV file or a glob of them")
    shards: str = key("", "name pattern of the shards to write, such as corpus/photos-%06d.tar")
    samples_per_shard: int = key(1000, "samples per shard")
    shuffle_seed: int = key(-1, "seed of the shuffled order; -1 keeps the order of the source")
    workers: int = key(0, "processes that write shards; 0 takes one per CPU core, up to 8")

    def __post_init__(self) -> None:
        _check_minimum("pack", self, 1, "samples_per_shard")
        _check_minimum("pack", self, -1, "shuffle_seed")
        _check_minimum("pack", self, 0, "workers")


@dataclass
class DecodeConfig:
    keys: list[str] = key([], "keys of the samples to decode; empty decodes the first rows")
    limit: int = key(16, "number of rows to decode when no keys are given")
    output: str = key("", "folder for the decoded images or audio files")

    def __post_init__(self) -> None:
        _check_minimum("decode", self, 1, "limit")


@dataclass
class ExportConfig:
    format: str = key("", "the format to write")
    to: str = key("", "folder or URL to write to; nothing is written outside of it")
    bos: int = key(-1, "token to write before each row, for nanogpt and megatron; -1 writes none")
    eos: int = key(-1, "token to write after each row, for nanogpt and megatron; -1 writes none")
    offset: int = key(0, "number to add to each token, for nanogpt and megatron")
    dtype: str = key(
        "", "nanogpt: uint16 or uint32; megatron: uint16 or int32; empty takes the first that holds every token"
    )
    workers: int = key(0, "processes, each with one token shard in memory; 0 takes one per CPU core, up to 8")

    def __post_init__(self) -> None:
        _check_minimum("export", self, -1, "bos", "eos", unit=" (none)")
        _check_minimum("export", self, 0, "offset", "workers")


@dataclass
class PretrainedConfig:
    source: str = key(
        "", "a published tokenizer: hf:ORG/NAME, or a folder or URL in the layout of the Hugging Face Hub"
    )
    revision: str = key("", "the commit, branch or tag on the Hub; empty takes the newest")
    subfolder: str = key("", "the folder of the tokenizer within the model, such as vqvae")
    num_quantizers: int = key(0, "how many codebooks of a residual quantizer to use; 0 uses all")
    name: str = key("", "the folder in RUN/tokenizers; empty takes the name of the source")
    preprocess: dict[str, Any] = key(
        {}, "settings of the model's modality, such as short_side; its sample rate is always the model's"
    )

    def __post_init__(self) -> None:
        _check_minimum("pretrained", self, 0, "num_quantizers")
        if "/" in self.name:
            raise ValueError(f"pretrained.name is {self.name!r}; it must be the name of a folder, without a slash")


@dataclass
class VerifyConfig:
    deep: bool = key(False, "also read all tokens and the input shards again; --deep is short for it")
    repair: bool = key(
        False, "read the whole output and remove what is damaged, so that the next tokenize makes it again"
    )
    dry_run: bool = key(False, "only show what repair or withdraw would remove")
    withdraw: list[str] = key(
        [], "lists of inputs (ids in OUT/inputs) or single shards (URL or name) to remove from the output"
    )


@dataclass
class ViewConfig:
    limit: int = key(48, "rows to decode and show")
    seed: int = key(0, "seed that selects the rows")
    page: str = key("", "file or URL of the page; empty writes OUT-view.html beside the output")

    def __post_init__(self) -> None:
        _check_minimum("view", self, 1, "limit")
        _check_minimum("view", self, 0, "seed")


@dataclass
class StatusConfig:
    json: bool = key(False, "print JSON for programs; --json is short for it")


@dataclass
class StorageConfig:
    """The usual AWS_* variables work without these keys. No output or run records the options, but a YAML file does:
    keep secrets in the environment.

    create_only=server relies on conditional writes, which we test before the first shard. checked is for servers that
    ignore the condition: it looks first, so only one command at a time may write to an output.
    """

    options: dict[str, Any] = key(
        {}, "fsspec options by protocol, such as {s3: {endpoint_url: ..., profile: ...}}; never stored in outputs"
    )
    create_only: str = key("server", "what prevents writing a shard twice: server (conditional writes) or checked")

    def __post_init__(self) -> None:
        if self.create_only not in ("server", "checked"):
            raise ValueError(f"storage.create_only is {self.create_only!r}; choose one of: server, checked")
        for protocol, options in self.options.items():
            if not isinstance(options, dict):  # without the value, which may be a secret
                raise ValueError(f"storage.options.{protocol} must hold keys, such as storage.options.s3.endpoint_url")


@dataclass
class Config:
    """Every key of every command. Each command uses some of them."""

    run: str = key("", "folder or URL of the training run, RUN", (*TRAINING, "codebook", *WITH_TOKENIZER, "import"))
    output: str = key(
        "",
        "folder or URL of the token shards, OUT",
        ("tokenize", "status", "verify", "audit", "retry", "decode", "export", "view"),
    )
    tokenizer: str = key("", "a frozen tokenizer; empty takes the only one in RUN/tokenizers", WITH_TOKENIZER)
    data: DataConfig = key(DataConfig, "input shards and their preprocessing")
    model: ModelConfig = key(ModelConfig, "the autoencoder")
    quantizer: dict[str, Any] = key({"name": "vp_vae"}, "the method: its name, and its settings", TRAINING)
    train: TrainConfig = key(TrainConfig, "training", ("train",))
    codebook: CodebookConfig = key(CodebookConfig, "making the codebook", ("codebook",))
    tokens: TokensConfig = key(TokensConfig, "encoding of samples", DECODING)
    workers: WorkersConfig = key(WorkersConfig, "processes on the Ray cluster", (*TRAINING, *POOLS))
    metrics: dict[str, Any] = key({}, "settings of the modality's metrics, such as perceptual", ("evaluate", "compare"))
    evaluate: EvaluateConfig = key(EvaluateConfig, "the report of evaluate", ("evaluate",))
    compare: CompareConfig = key(CompareConfig, "a comparison of methods", ("compare",))
    audit: AuditConfig = key(AuditConfig, "a check of random rows", ("audit",))
    pack: PackConfig = key(PackConfig, "making shards", ("pack",))
    decode: DecodeConfig = key(DecodeConfig, "tokens back to images or audio", ("decode",))
    export: ExportConfig = key(ExportConfig, "tokens in the format of another reader", ("export",))
    pretrained: PretrainedConfig = key(PretrainedConfig, "a published tokenizer", ("import",))
    verify: VerifyConfig = key(VerifyConfig, "the proof of an output", ("verify",))
    view: ViewConfig = key(ViewConfig, "a page that shows an output", ("view",))
    status: StatusConfig = key(StatusConfig, "the progress of an output", ("status",))
    storage: StorageConfig = key(StorageConfig, "access to object storage", ALL)

    def __post_init__(self) -> None:
        self.written: dict[str, str] = {}  # keys from environment variables, as they are written; load_config sets it
        self.command = ""  # the command line, without secrets, for reports; jobs/__main__.py sets it

    def with_changes(self, **changes: Any) -> "Config":
        """A copy with other values at these keys. dataclasses.replace would lose `written`."""
        config = copy.copy(self)
        for name, value in changes.items():
            setattr(config, name, value)
        return config

    def to_dict(self) -> dict[str, Any]:
        """For artifacts: without `storage`, which may hold secrets, and without values of environment variables."""
        settings = {name: value for name, value in dataclasses.asdict(self).items() if name != "storage"}
        if not self.tokens.views.count:
            del settings["tokens"]["views"]  # so that artifacts without views stay as they were
        return with_written(settings, self.written)

    def require(self, *keys: str) -> None:
        """Raises ConfigError that names the first of these keys that is empty."""
        for name in keys:
            value: Any = self
            for part in name.split("."):
                value = getattr(value, part)
            if value in ("", None, [], {}):
                raise ConfigError(f"{name} is not set; give {name}=... on the command line or in the YAML file")


def _check_minimum(section: str, config: Any, minimum: int, *names: str, unit: str = "") -> None:
    for name in names:
        if getattr(config, name) < minimum:
            value = getattr(config, name)
            raise ValueError(f"{section}.{name} is {value}; it must be {minimum}{unit} or more")


@dataclass(frozen=True)
class Key:
    """name: dotted, such as train.steps."""

    name: str
    default: Any
    description: str
    commands: tuple[str, ...]


def all_keys(section: type = Config, prefix: str = "", commands: tuple[str, ...] = ()) -> Iterator[Key]:
    """Every key of a section and of the sections in it, in their order. commands: those that use the section."""
    for f in dataclasses.fields(section):
        used_by = f.metadata["commands"] or commands
        if dataclasses.is_dataclass(f.type):
            yield from all_keys(f.type, f"{prefix}{f.name}.", used_by)  # type: ignore[arg-type]
        else:
            made = f.default_factory() if callable(f.default_factory) else f.default
            yield Key(prefix + f.name, made, f.metadata["description"], used_by)
