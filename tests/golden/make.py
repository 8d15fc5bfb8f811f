"""Makes the golden artifacts with the current code: `python -m tests.golden.make` (one minute).

Run it again only when a format changes on purpose and CHANGELOG.md says so. Users' old artifacts then need a reader or
a migration. Never run it to make a failing test pass. If the tars change, increase the number in HOME in names.py.

It makes these files in tests/golden:
  in/            five shards: pictures with captions (one sample broken, one large), one shard compressed; sound
  run/           4 training steps of VP-VAE through Ray: config, checkpoint of step 2, model, tokenizer, latents
  tokenizers/    one frozen tokenizer per method, untrained, and one of sound
  out/           tokens of the pictures, as lists, with quarantine and a retry       out_audio/   packed, residual
  decoded/       what `decode` gives for two rows of each
  expected.json  ids, tokens, fields and defaults of Configs, what seeds draw        keys.yaml  every configuration key
"""

import contextlib
import gzip
import io
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import yaml

from tests.corpus import encoded, picture, tar_bytes
from tests.golden import names
from tests.golden.names import GOLDEN, HOME, PHOTOS, RUN_TOKENIZER, SOUND, command

MADE = HOME / "made"
IMAGE_NET = {"name": "resnet32", "channels": 4, "res_blocks": 1}
SOUND_NET = {"name": "seanet", "width": 2, "decoder_width": 2, "strides": [4, 4], "dilations": [1], "channels": 4}
RUN = {
    "run": f"{MADE}/run",
    "data": {"shards": PHOTOS, "preprocess": {"short_side": 16}},
    "model": {
        "net": {
            **{"name": "vqgan", "width": 4, "multipliers": [1], "res_blocks": 1, "channels": 4},
            **{"attention": False, "patch_size": 4},
        }
    },
    "quantizer": {"name": "vp_vae", "codebook_size": 16, "dim": 2},
    "train": {
        **{"steps": 4, "batch_size": 4, "crop_size": 16, "lr": 3e-3, "warmup_steps": 1, "shuffle_buffer": 8},
        **{"log_every": 1, "checkpoint_every": 2, "ema": 0.5},
    },
    "codebook": {"cache": True, "max_latents": 200},
    "workers": {"count": 1, "cpus": 1},
    "tokenizer": f"{MADE}/{RUN_TOKENIZER}",
    "output": f"{MADE}/out",
    "tokens": {"passthrough": ["txt"], "max_bad_fraction": 0.5},
}
TABLE: dict[str, Any] = {"codebook_size": 16, "dim": 3}
SCALAR: dict[str, Any] = {"codebook_size": 16}
QUANTIZERS: dict[str, dict[str, Any]] = {
    "fsp": SCALAR,
    "fsq": SCALAR,
    "lfq": SCALAR,
    "bsq": SCALAR,
    "vq_vae": TABLE,
    "ema_vq": TABLE,
    "sim_vq": TABLE,
    "sq_vae": TABLE,
    "gm_vq": TABLE,
    "gumbel": TABLE,
    "ibq": TABLE,
    "residual": {"base": {"name": "vq_vae"}, "num_quantizers": 3, **TABLE},
    "product": {"base": {"name": "vp_vae"}, "groups": 2, "codebook_size": 16, "dim": 4},
    "token_bridge": {},
}


def main() -> int:
    for name in ("in", "run", "tokenizers", "out", "out_audio", "decoded"):
        shutil.rmtree(GOLDEN / name, ignore_errors=True)
    shutil.rmtree(MADE, ignore_errors=True)
    torch.set_num_threads(1)
    make_corpus()
    names.place_corpus()
    make_run()
    make_tokenizers()
    make_outputs()
    make_expected()
    shutil.rmtree(MADE)
    total = sum(file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file() and file.suffix != ".pyc")
    print(f"golden: {total / 1000:.0f} kB in {GOLDEN}")
    return 0


def make_corpus() -> None:
    folder = GOLDEN / "in"
    folder.mkdir()
    for i, count in enumerate((5, 4, 4, 4)):
        members = []
        for j in range(count):
            key, data = f"{i}{j:02d}", encoded(picture(24, 32, seed=10 * i + j))
            if (i, j) == (1, 1):
                key, data = "large", encoded(picture(56, 48, seed=99))
            if (i, j) in ((1, 2), (3, 0)):
                key, data = f"broken{i}", data[:200]
            members += [(f"{key}.png", data), (f"{key}.txt", f"picture {key}".encode())]
        _write_tar(folder, f"photos-{i:03d}", tar_bytes(members), compressed=i == 2)
    t = np.arange(4000) / 16_000
    waves = {"low": 0.4 * np.sin(2 * np.pi * 200 * t), "rising": 0.3 * np.sin(2 * np.pi * (300 + 2000 * t) * t)}
    members = []
    for key, wave in waves.items():
        out = io.BytesIO()
        soundfile.write(out, wave + np.random.default_rng(0).normal(0, 0.02, len(t)), 16_000, "PCM_16", format="WAV")
        members.append((f"{key}.wav", out.getvalue()))
    _write_tar(folder, "sound-000", tar_bytes(members), compressed=False)


def _write_tar(folder: Path, name: str, data: bytes, compressed: bool) -> None:
    """tarfile pads a tar to 10 kB, but two blocks of zeros are enough."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        end = max(m.offset_data + -(-m.size // 512) * 512 for m in archive.getmembers())
    data = data[:end] + bytes(1024)
    if compressed:
        (folder / f"{name}.tar.gz").write_bytes(gzip.compress(data, mtime=0))
    else:
        (folder / f"{name}.tar").write_bytes(data)


def make_run() -> None:
    """Trains and makes the codebook through Ray."""
    MADE.mkdir()
    config = MADE / "golden.yaml"
    config.write_text(yaml.safe_dump(RUN))
    os.environ.pop("RAY_ADDRESS", None)
    for job in ("train", "codebook"):
        assert command(job, str(config)) == 0
    run = MADE / "run"
    shutil.rmtree(run / "reports" / "tensorboard")
    for large in [*(run / "reports").glob("*.html"), *(run / "reports").glob("*.png")]:
        large.unlink()
    tokenizer = names.load(MADE / RUN_TOKENIZER)
    assert names.tokens_keep_distance(tokenizer, count=100), "choose other seeds for the pictures"
    shutil.copytree(run, GOLDEN / "run")


def make_tokenizers() -> None:
    for name, settings in QUANTIZERS.items():
        _make_tokenizer(name, {"modality": "image", "net": IMAGE_NET, "quantizer": {"name": name, **settings}})
    residual = {"name": "residual", "base": {"name": "vq_vae"}, "num_quantizers": 3, "codebook_size": 16, "dim": 3}
    _make_tokenizer("sound", {"modality": "audio", "net": SOUND_NET, "quantizer": residual})


def _make_tokenizer(name: str, settings: dict[str, Any]) -> None:
    """A tokenizer with the weights of the first seed for which no token of the samples is close to another code."""
    for seed in range(200):
        tokenizer = _untrained(settings, seed)
        distinct = min(len(np.unique(tokens)) for tokens in names.tokens_of(tokenizer).values())
        if distinct > 3 and names.tokens_keep_distance(tokenizer):
            print(f"golden: {name} with seed {seed}, at least {distinct} codes in a sample")
            tokenizer.save_pretrained(GOLDEN / "tokenizers" / name)
            return
    raise AssertionError(f"no seed gives {name} tokens that are far enough from other codes")


def _untrained(settings: dict[str, Any], seed: int) -> names.Tokenizer:
    torch.manual_seed(seed)
    autoencoder = names.Autoencoder(settings)
    x = torch.rand(8, 1, 3200) - 0.5 if settings["modality"] == "audio" else torch.rand(8, 3, 32, 32)
    with torch.no_grad():
        autoencoder.train()(x)  # gives buffers values other than their initial ones
        autoencoder.eval()
        probe = names.LatentEncoder(autoencoder, {})
        z = torch.cat([torch.from_numpy(part).flatten(0, -2) for part in names.latents_of(probe).values()])
        autoencoder.project_in.weight /= z.std(0)[:, None]
        autoencoder.project_in.bias.sub_(z.mean(0)).div_(z.std(0))
        autoencoder.quantizer.fit((z - z.mean(0)) / z.std(0))
    return names.Tokenizer(autoencoder, {})


def make_outputs() -> None:
    """Tokenizes the pictures in three runs: with Ray, in this process with a retry, and with Ray again for the rest."""
    config, out = str(MADE / "golden.yaml"), MADE / "out"
    assert command("tokenize", config, f"data.shards={HOME}/in/photos-000.tar") == 0
    names.tokenize_then_retry(f"{HOME}/in/photos-001.tar", MADE / RUN_TOKENIZER, out, passthrough=["txt"])
    assert command("tokenize", config) == 0
    assert command("verify", config, "verify.deep=true") == 0
    shutil.copytree(out, GOLDEN / "out")
    shutil.copytree(GOLDEN / "tokenizers/sound", MADE / "sound")
    sound = [f"tokenizer={MADE}/sound", f"output={MADE}/out_audio"]
    assert command("tokenize", *sound, f"data.shards={SOUND}", "tokens.encoding=packed") == 0
    shutil.copytree(MADE / "out_audio", GOLDEN / "out_audio")
    for name, tokenizer in (("out", GOLDEN / RUN_TOKENIZER), ("out_audio", GOLDEN / "tokenizers/sound")):
        given = [f"output={GOLDEN / name}", f"tokenizer={tokenizer}", "decode.limit=2"]
        given.append(f"decode.output={GOLDEN}/decoded/{name}")
        assert command("decode", *given) == 0


def make_expected() -> None:
    (GOLDEN / "keys.yaml").write_text(names.all_keys())
    folders = [GOLDEN / RUN_TOKENIZER, *sorted((GOLDEN / "tokenizers").iterdir())]
    tokenizers = {}
    for folder in folders:
        tokenizer = names.load(folder)
        tokens = {
            key: {"shape": list(t.shape), "tokens": " ".join(map(str, t.ravel()))}
            for key, t in names.tokens_of(tokenizer).items()
        }
        tokenizers[str(folder.relative_to(GOLDEN))] = {**names.ids_of(tokenizer), "samples": tokens}
    expected = {
        "tokenizers": tokenizers,
        "shards": {shard.url: shard.name for shard in names.shards_of(PHOTOS)},
        "input_manifest_id": names.manifest_id(PHOTOS),
        "configs": names.config_defaults(),
        "seeds": names.seed_recipes(),
        "status_names": sorted(names.names_in(_status())),
    }
    (GOLDEN / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def _status() -> dict[str, Any]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert command("status", f"output={GOLDEN / 'out'}", "status.json=true") == 0
    return json.loads(printed.getvalue())


if __name__ == "__main__":
    sys.exit(main())
