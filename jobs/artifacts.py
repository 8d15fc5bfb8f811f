"""Finds and loads the tokenizer or trained model of a command, and the layout of the shards that it writes."""

from dataclasses import replace
from typing import Any

import yaml

from jobs.config import Config, ConfigError, TokensConfig
from pipeline import storage
from pipeline.errors import OutputMismatch
from pipeline.tokens import Output, ShardLayout
from tokenizer.autoencoder import Autoencoder
from tokenizer.encoder import LatentEncoder
from tokenizer.modalities.base import MODALITIES, Modality
from tokenizer.tokenizer import INDEX_ORDER, Tokenizer


def tokenizer_url(config: Config) -> str:
    """The key `tokenizer`, or the only tokenizer in RUN/tokenizers. Raises ConfigError if there is none, or several."""
    if config.tokenizer:
        return storage.normalise(config.tokenizer)
    config.require("run")
    urls, folder = _tokenizers(config.run), storage.join(storage.normalise(config.run), "tokenizers")
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
        inside = [one for one in (*storage.list_folders(url), *_tokenizers(url)) if _is_tokenizer(one)]
        hint = f"did you mean {' or '.join(inside)}?" if inside else "make one with `tokenmill codebook`"
        raise ConfigError(f"{url} is not a tokenizer ({error}); {hint}") from error


def _is_tokenizer(url: str) -> bool:
    return storage.exists(storage.join(url, "tokenizer.json"))


def check_limits(modality: Modality, options: TokensConfig) -> None:
    """Raises ConfigError if the options set a limit that this modality does not have."""
    try:
        modality.with_limits(options.limits())
    except ValueError as error:
        raise ConfigError(f"tokens.{error}; leave it out") from error


def load_trained(run_url: str) -> Autoencoder:
    """The model of a run. Raises ConfigError if training has not finished."""
    try:
        with storage.downloaded(storage.join(run_url, "model")) as folder:
            return Autoencoder.load(folder)
    except FileNotFoundError as error:
        raise ConfigError(f"{run_url} holds no trained model; run `tokenmill train` first ({error})") from error


def with_rules_of_run(config: Config, run_url: str, command: str) -> Config:
    """config, with the preprocessing that a run of an earlier version has without stating it. Prints what that is."""
    try:
        stored = yaml.safe_load(storage.read(storage.join(run_url, "config.yaml")))
    except FileNotFoundError:
        return config
    given, absent = config.data.preprocess, MODALITIES.get(stored["model"]["modality"]).unstated
    kept = {
        key: old
        for key, old in absent.items()
        if key not in stored["data"]["preprocess"] and given.get(key, old) != old
    }
    for key, old in kept.items():
        print(f"{command}: {run_url} was started by an earlier version and keeps data.preprocess.{key}={old}")
    return config.with_changes(data=replace(config.data, preprocess=given | kept))


def load_encoder(run_url: str, preprocess: dict[str, Any], device: str = "cpu") -> LatentEncoder:
    """The encoder half of a run's model. Raises ConfigError if training has not finished."""
    return LatentEncoder(load_trained(run_url), preprocess).to(device)


def writer_url(output: Output, config: Config) -> str:
    """URL of the tokenizer that wrote the output: the key `tokenizer`, else where the output's dataset.json says it
    was, else one in RUN/tokenizers. Raises OutputMismatch if none of them is the one."""
    stored = output.about()["config"]
    urls = [config.tokenizer] if config.tokenizer else [stored.get("tokenizer", "")]
    if not config.tokenizer:
        runs = dict.fromkeys(run for run in (config.run, stored.get("run", "")) if run)
        urls += [url for run in runs for url in _tokenizers(run)]
    urls = list(dict.fromkeys(storage.normalise(url) for url in urls if url))
    found = {url: tokenizer for url in urls if (tokenizer := _tokenizer_at(url, required=bool(config.tokenizer)))}
    for url, tokenizer in found.items():
        if tokenizer.id == output.layout.tokenizer_id:
            check_limits(tokenizer.modality, config.tokens)
            return url
    seen = (
        ", ".join(f"{url} is {tokenizer.id}" for url, tokenizer in found.items()) or f"nothing is at {', '.join(urls)}"
    )
    raise OutputMismatch(
        f"{output.url} was written by tokenizer {output.layout.tokenizer_id}, but {seen}; "
        "set tokenizer=... to the one that wrote the output"
    )


def _tokenizer_at(url: str, required: bool) -> Tokenizer | None:
    """The tokenizer at the URL; None if there is none, unless it is required."""
    try:
        return load_tokenizer(url)
    except ConfigError:
        if required:
            raise
        return None


def _tokenizers(run: str) -> list[str]:
    return storage.list_folders(storage.join(storage.normalise(run), "tokenizers"))


def check_member(member: str, modality: Modality) -> None:
    """Raises ConfigError if data.member is no file of this modality."""
    if member and member.rsplit(".", 1)[-1] not in modality.extensions:
        raise ConfigError(
            f"data.member is {member!r}; it must end in one of: {', '.join(modality.extensions)}, such as left.jpg"
        )


def token_layout(tokenizer: Tokenizer, options: TokensConfig, member: str = "") -> ShardLayout:
    """The layout of every token shard that this tokenizer writes. Raises ConfigError if the options do not fit it."""
    views, modality = options.views.chosen(), tokenizer.modality
    try:
        if views:
            modality.with_limits(options.limits()).check_views(views.crop, views.flip)
        return ShardLayout.for_tokens(
            tokenizer_id=tokenizer.id,
            codebook_id=tokenizer.codebook_id,
            codebook_size=tokenizer.codebook_size,
            modality=modality.name,
            index_order=INDEX_ORDER,
            preprocessing=tokenizer.preprocessing,
            encoding=options.encoding,
            passthrough=options.passthrough,
            member=member,
            views=views,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def latent_layout(encoder: LatentEncoder, options: TokensConfig, member: str = "") -> ShardLayout:
    """The layout of every shard of latents that this encoder writes."""
    return ShardLayout.for_latents(
        encoder_id=encoder.encoder_id,
        modality=encoder.modality.name,
        preprocessing=encoder.preprocessing,
        passthrough=options.passthrough,
        member=member,
    )
