"""Which frozen tokenizer or trained model a command means, and loading it."""

from typing import Any

from jobs.config import Config, ConfigError
from pipeline import storage
from pipeline.errors import OutputMismatch
from pipeline.tokens import Output
from tokenizer.autoencoder import Autoencoder
from tokenizer.encoder import LatentEncoder
from tokenizer.tokenizer import Tokenizer


def tokenizer_url(config: Config) -> str:
    """`tokenizer` if given, else the only one in RUN/tokenizers. Raises ConfigError where that is none, or several."""
    if config.tokenizer:
        return storage.normalise(config.tokenizer)
    config.require("run")
    folder = storage.join(storage.normalise(config.run), "tokenizers")
    found = storage.list_folders(folder)
    if not found:
        raise ConfigError(f"{folder} holds no tokenizer; run `tokenmill codebook` first, or set tokenizer=...")
    if len(found) > 1:
        raise ConfigError(f"{folder} holds several tokenizers; choose one by tokenizer=...: {', '.join(found)}")
    return found[0]


def load_tokenizer(url: str, device: str = "cpu") -> Tokenizer:
    """Raises ConfigError if there is no tokenizer, TokenizerMismatch if its files do not belong together."""
    try:
        with storage.downloaded(url) as folder:
            return Tokenizer.from_pretrained(folder, device)
    except FileNotFoundError as error:
        raise ConfigError(f"{url} is no tokenizer ({error}); make one with `tokenmill codebook`") from error


def load_trained(run_url: str) -> Autoencoder:
    """The model of a run. Raises ConfigError if training has not left one."""
    try:
        with storage.downloaded(storage.join(run_url, "model")) as folder:
            return Autoencoder.load(folder)
    except FileNotFoundError as error:
        raise ConfigError(f"{run_url} holds no trained model; run `tokenmill train` first ({error})") from error


def load_encoder(run_url: str, preprocess: dict[str, Any], device: str = "cpu") -> LatentEncoder:
    """Its encoder half. Raises ConfigError like load_trained."""
    return LatentEncoder(load_trained(run_url), preprocess).to(device)


def writer_url(output: Output, config: Config) -> str:
    """URL of the tokenizer, which must be the one that wrote the output. Raises OutputMismatch if it is another."""
    url = tokenizer_url(config)
    tokenizer = load_tokenizer(url)
    if tokenizer.id != output.layout.tokenizer_id:
        raise OutputMismatch(
            f"{output.url} was written by tokenizer {output.layout.tokenizer_id}, this one is {tokenizer.id}; "
            "set tokenizer=... to the one that wrote it"
        )
    return url
