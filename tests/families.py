"""Small random models of published tokenizer families, made by the families' own classes, and their own tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

Tokens = Callable[[Any, torch.Tensor], np.ndarray]  # (model, what the library takes for one sample) -> tokens
Decoded = Callable[[Any, torch.Tensor], torch.Tensor]  # (model, tokens) -> what the library decodes


@dataclass
class Family:
    """build: a model with random weights. tokens, decoded: the library's own, of one sample in a batch of one."""

    modality: str
    build: Callable[[], nn.Module]
    tokens: Tokens
    decoded: Decoded | None
    multiple: int = 1  # the library's own feature extractor pads a clip with zeros to a multiple of this


def encodec() -> nn.Module:
    from transformers import EncodecConfig, EncodecModel

    small = {"num_filters": 4, "hidden_size": 16, "codebook_size": 32, "codebook_dim": 16, "num_lstm_layers": 1}
    rates = {"upsampling_ratios": [4, 3, 2], "sampling_rate": 24000, "target_bandwidths": [5.0, 20.0]}
    return EncodecModel(EncodecConfig(**small, **rates))


def dac() -> nn.Module:
    from transformers import DacConfig, DacModel

    sizes = {"encoder_hidden_size": 4, "decoder_hidden_size": 32, "codebook_size": 32, "codebook_dim": 4}
    return DacModel(DacConfig(downsampling_ratios=[2, 3, 4], n_codebooks=4, sampling_rate=16000, **sizes))


def mimi() -> nn.Module:
    from transformers import MimiConfig, MimiModel

    sizes = {"num_filters": 4, "hidden_size": 32, "codebook_size": 32, "codebook_dim": 16, "intermediate_size": 32}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    rates = {"upsampling_ratios": [4, 3, 2], "sampling_rate": 24000, "frame_rate": 500.0, "upsample_groups": 32}
    quantizers = {"num_quantizers": 4, "num_semantic_quantizers": 1, "vector_quantization_hidden_dimension": 16}
    return MimiModel(MimiConfig(**sizes, **layers, **rates, **quantizers, sliding_window=8))


def wavtokenizer() -> nn.Module:
    from transformers import WavTokenizerConfig, WavTokenizerModel

    sizes = {"num_filters": 4, "hidden_size": 16, "codebook_size": 32, "codebook_dim": 16, "num_lstm_layers": 1}
    decoder = {"decoder_hidden_size": 32, "decoder_intermediate_size": 32, "decoder_num_layers": 1}
    return WavTokenizerModel(WavTokenizerConfig(upsampling_ratios=[4, 3, 2], **sizes, **decoder))


def vq_model() -> nn.Module:
    from diffusers import VQModel

    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    sizes = {"block_out_channels": [8, 16], "latent_channels": 4, "num_vq_embeddings": 32, "norm_num_groups": 4}
    return VQModel(**blocks, **sizes)


def _vqgan(config: str, model: str, **extra: Any) -> nn.Module:
    import transformers

    sizes = {
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "embed_dim": 8,
    }
    settings = {**sizes, "latent_channels": 8, **extra}
    return getattr(transformers, model)(getattr(transformers, config)(**settings))


def janus() -> nn.Module:
    return _vqgan("JanusVQVAEConfig", "JanusVQVAE", num_embeddings=32, num_patches=8)


def chameleon() -> nn.Module:
    return _vqgan("ChameleonVQVAEConfig", "ChameleonVQVAE", num_embeddings=32, resolution=16)


def emu3() -> nn.Module:
    return _vqgan(
        "Emu3VQVAEConfig",
        "Emu3VQVAE",
        codebook_size=32,
        temporal_downsample_factor=2,
        hidden_size=32,
        num_attention_heads=1,
    )


def _vq_model_tokens(model: Any, x: torch.Tensor) -> np.ndarray:
    h = model.encode(x).latents
    return model.quantize(h)[2][2].reshape(h.shape[2:]).numpy()


def _vq_model_decoded(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    shape = (1, *tokens.shape, model.quantize.vq_embed_dim)
    return model.decode(model.quantize.get_codebook_entry(tokens.flatten(), shape), force_not_quantize=True).sample


def _grid(tokens: torch.Tensor, x: torch.Tensor) -> np.ndarray:
    return tokens.reshape(x.shape[2] // 2, x.shape[3] // 2).numpy()


FAMILIES = {
    "encodec": Family(
        "audio",
        encodec,
        lambda model, x: model.encode(x, bandwidth=20.0).audio_codes[0, 0].numpy(),
        lambda model, tokens: model.decode(tokens[None, None], [None]).audio_values,
    ),
    "dac": Family(
        "audio",
        dac,
        lambda model, x: model.encode(x).audio_codes[0].numpy(),
        lambda model, tokens: model.decode(audio_codes=tokens[None]).audio_values[:, None],
        multiple=24,
    ),
    "mimi": Family(
        "audio",
        mimi,
        lambda model, x: model.encode(x).audio_codes[0].numpy(),
        lambda model, tokens: model.decode(tokens[None]).audio_values,
    ),
    "wavtokenizer": Family(
        "audio",
        wavtokenizer,
        lambda model, x: model.encode(x).audio_codes[0, 0].numpy(),
        lambda model, tokens: model.decode(tokens[None, None]).audio_values,
    ),
    "vq_model": Family("image", vq_model, _vq_model_tokens, _vq_model_decoded),
    "janus": Family(
        "image",
        janus,
        lambda model, x: _grid(model.encode(x).image_tokens, x),
        lambda model, tokens: model.decode(tokens.reshape(1, -1)),
    ),
    "chameleon": Family("image", chameleon, lambda model, x: _grid(model.encode(x).image_tokens, x), None),
    "emu3": Family(
        "image",
        emu3,
        lambda model, x: model.encode(x, torch.tensor([x.shape[2:]])).image_tokens[0].numpy(),
        lambda model, tokens: model.decode(tokens[None]),
    ),
}


def save(name: str, folder: Path, seed: int = 0) -> nn.Module:
    """Writes a model in the layout of the Hugging Face Hub and returns it as its own library reads it."""
    torch.manual_seed(seed)
    model = FAMILIES[name].build().eval()
    _spread_tokens(model, name)
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


@torch.no_grad()
def _spread_tokens(model: nn.Module, name: str) -> None:
    """Codes as large as the latents of noise, and no biases, since random models give each frame the same token."""
    for key, tensor in model.named_parameters():
        if key.endswith(".bias"):
            tensor.zero_()
    size = _size_of_latents(model, name)
    for key, tensor in model.state_dict().items():
        if key.endswith(("codebook.embed", "embedding.weight")) or key.endswith("embed_sum"):
            tensor.normal_(0, size)


def _size_of_latents(model: Any, name: str) -> float:
    """Standard deviation of what the quantizer gets for noise."""
    seen: list[torch.Tensor] = []
    encoder = getattr(model, "quant_conv", None) or getattr(model, "encoder", None) or model.encoder_model.encoder
    hook = encoder.register_forward_hook(lambda module, args, out: seen.append(getattr(out, "latents", out)))
    shape = (1, 1, 2400) if FAMILIES[name].modality == "audio" else (1, 3, 16, 16)
    FAMILIES[name].tokens(model, torch.rand(shape) - 0.5)
    hook.remove()
    return float(seen[-1].std())
