"""Finds and loads the tokenizer or trained model of a command, and the layout of the shards that it writes."""

from typing import Any

from jobs.config import Config, ConfigError, TokensConfig
from pipeline import storage
from pipeline.errors import OutputMismatch
from pipeline.tokens import Output, ShardLayout
from tokenizer.autoencoder import Autoencoder
from tokenizer.encoder import LatentEncoder
from tokenizer.tokenizer import INDEX_ORDER, Tokenizer


def tokenizer_url(config: Config) -> str:
    """The key `tokenizer`, or the only tokenizer in RUN/tokenizers. Raises ConfigError if there is none, or several."""
    if config.tokenizer:
        return storage.normalise(config.tokenizer)
    config.require("run")
    folder = storage.join(storage.normalise(config.run), "tokenizers")
    urls = storage.list_folders(folder)
    if not urls:
        raise ConfigError(f"{folder} holds no tokenizer; run `tokenmill codebook` first, or set tokenizer=...")
    if len(urls) > 1:
        raise ConfigError(f"{folder} holds several tokenizers; set tokenizer=... to one of: {', '.join(urls)}")
    return urls[0]


def load_tokenizer(url: str, device: str = "cpu") -> Tokenizer:
    """Raises ConfigError if there is no tokenizer, TokenizerMismatch if its files do not belong together."""
    try:
        with storage.downloaded(url) as folder:
            return Tokenizer.from_pretrained(folder, device)
    except FileNotFoundError as error:
        raise ConfigError(f"{url} is not a tokenizer ({error}); make one with `tokenmill codebook`") from error


def load_trained(run_url: str) -> Autoencoder:
    """The model of a run. Raises ConfigError if training has not finished."""
    try:
        with storage.downloaded(storage.join(run_url, "model")) as folder:
            return Autoencoder.load(folder)
    except FileNotFoundError as error:
        raise ConfigError(f"{run_url} holds no trained model; run `tokenmill train` first ({error})") from error


def load_encoder(run_url: str, preprocess: dict[str, Any], device: str = "cpu") -> LatentEncoder:
    """The encoder half of a run's model. Raises ConfigError if training has not finished."""
    return LatentEncoder(load_trained(run_url), preprocess).to(device)


def writer_url(output: Output, config: Config) -> str:
    """URL of the configured tokenizer. Raises OutputMismatch if it is not the one that wrote the output."""
    url = tokenizer_url(config)
    tokenizer = load_tokenizer(url)
    if tokenizer.id != output.layout.tokenizer_id:
        raise OutputMismatch(
            f"{output.url} was written by tokenizer {output.layout.tokenizer_id}, but {url} is {tokenizer.id}; "
            "set tokenizer=... to the one that wrote the output"
        )
    return url


def token_layout(tokenizer: Tokenizer, options: TokensConfig) -> ShardLayout:
    """The layout of every token shard that this tokenizer writes. Raises ConfigError if the options do not fit it."""
    try:
        return ShardLayout.for_tokens(
            tokenizer_id=tokenizer.id,
            codebook_id=tokenizer.codebook_id,
            codebook_size=tokenizer.codebook_size,
            modality=tokenizer.modality.name,
            index_order=INDEX_ORDER,
            preprocessing=tokenizer.preprocessing,
            encoding=options.encoding,
            passthrough=options.passthrough,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def latent_layout(encoder: LatentEncoder, options: TokensConfig) -> ShardLayout:
    """The layout of every shard of latents that this encoder writes."""
    return ShardLayout.for_latents(
        encoder_id=encoder.encoder_id,
        modality=encoder.modality.name,
        preprocessing=encoder.preprocessing,
        passthrough=options.passthrough,
    )
