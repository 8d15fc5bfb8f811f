"""Imports a published tokenizer, without its library's training code: `import SOURCE run=RUN`.

SOURCE is hf:ORG/NAME on the Hugging Face Hub, or a folder or URL with config.json and *.safetensors. Writes
RUN/tokenizers/NAME, a tokenizer like any other for tokenize, verify, decode and evaluate. Its tokens are those of its
own library. No code of the model is run, and no pickled weights are read. See docs/tutorials/import.md.
"""

import contextlib
import importlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jobs.artifacts import load_tokenizer
from jobs.config import Config, ConfigError, typed_preprocess
from pipeline import storage
from tokenizer.adapters.base.adapter import library
from tokenizer.adapters.base.model import read_model
from tokenizer.tokenizer import Tokenizer

HUB = "hf:"
FILES = ("*.json", "*.safetensors")  # neither code nor pickles are downloaded


def run(config: Config) -> int:
    config.require("pretrained.source", "run")
    options = config.pretrained
    try:
        with _folder(config) as folder:
            model = read_model(folder)
            given = typed_preprocess(model.adapter.modality, options.preprocess, "pretrained.preprocess.")
            tokenizer = model.freeze(options.num_quantizers, given)
    except FileNotFoundError as error:
        raise ConfigError(f"pretrained.source is {options.source}, which is no model: {error}") from error
    url = storage.join(storage.normalise(config.run), "tokenizers", _name(config))
    if storage.exists(storage.join(url, "tokenizer.json")):
        return _existing(url, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        storage.upload(folder, url)
    print(f"import: {url}  {tokenizer}")
    for line in _advice(tokenizer, url):
        print(f"import: {line}")
    return 0


@contextlib.contextmanager
def _folder(config: Config) -> Iterator[Path]:
    """The source as a local folder."""
    source, subfolder = config.pretrained.source, config.pretrained.subfolder
    if source.startswith(HUB):
        with tempfile.TemporaryDirectory() as folder:
            yield _download(source.removeprefix(HUB), config.pretrained.revision, Path(folder)) / subfolder
        return
    if config.pretrained.revision:
        raise ConfigError("pretrained.revision is for models of the Hub; leave it out")
    with storage.downloaded(storage.join(storage.normalise(source), subfolder) if subfolder else source) as folder:
        yield Path(folder)


def _download(name: str, revision: str, folder: Path) -> Path:
    """The files of a model on the Hub, or on the server of the environment variable HF_ENDPOINT."""
    hub = library("huggingface_hub")
    errors = importlib.import_module("huggingface_hub.errors")
    where = {"local_dir": folder, "allow_patterns": [*FILES, *(f"**/{pattern}" for pattern in FILES)]}
    endpoint = os.environ.get("HF_ENDPOINT")
    print(f"import: downloading {name}{f' at revision {revision}' if revision else ''} from the Hugging Face Hub")
    try:
        return Path(hub.snapshot_download(name, revision=revision or None, endpoint=endpoint, **where))
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalEntryNotFoundError, OSError) as error:
        what = " ".join(str(error).split())
        raise ConfigError(
            f"hf:{name} cannot be downloaded ({what}); check the name and the connection, and set HF_TOKEN for a "
            "private or gated model"
        ) from error


def _name(config: Config) -> str:
    return config.pretrained.name or config.pretrained.source.rstrip("/").rsplit("/", 1)[-1].removeprefix(HUB)


def _existing(url: str, tokenizer: Tokenizer) -> int:
    """Says that the tokenizer exists. Raises ConfigError if another one has its place."""
    existing = load_tokenizer(url)
    if existing.id != tokenizer.id:
        raise ConfigError(
            f"{url} is tokenizer {existing.id}, and the import would be {tokenizer.id}; choose another "
            "pretrained.name, or delete the folder"
        )
    print(f"import: {url} already exists  {existing}")
    return 0


def _advice(tokenizer: Tokenizer, url: str) -> Iterator[str]:
    """What to know before tokenizing."""
    if tokenizer.autoencoder.net.one_by_one:
        yield "its samples are encoded one at a time, so that their tokens do not depend on the batch"
    if tokenizer.modality.name == "image" and not tokenizer.preprocessing.get("short_side"):
        yield (
            "pictures keep their size; if the model was trained at one size, set it now: import again with "
            "pretrained.preprocess.short_side=... and pretrained.preprocess.center_crop=true"
        )
    yield f"next: tokenmill tokenize tokenizer={url} data.shards=... output=..."
