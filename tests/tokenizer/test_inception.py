"""The net of the FID, compared to torch-fidelity's."""

import pytest
import torch
from torch import Tensor

from tokenizer.modalities.image.inception import FidInception, resize_as_tensorflow_1

REFERENCE = [
    *(0.98562, 0.19854, 0.00025292, 0.97532, 0.0045364, 0.37466, 0.0, 0.0031384),  # first picture, first eight
    *(1.3388, 0.65631, 0.09648, 0.066064, 0.0088052, 0.20504, 0.02005, 0.88992),  # second picture, last eight
    *(0.49276, 0.47551),  # mean and standard deviation of all features
]


def numbers(*shape: int) -> Tensor:
    """Irregular numbers in -1..1, the same on every machine."""
    i = torch.arange(torch.Size(shape).numel())
    return (((7 * i * i + 13 * i) % 997).float() / 498 - 1).reshape(shape)


def made_up(net: FidInception) -> FidInception:
    """A net whose weights keep the scale of their input. No tensor consists only of zeros or ones."""
    state = net.state_dict()
    for name, old in state.items():
        if name.endswith("conv.weight"):
            state[name] = numbers(*old.shape) * (6 / old[0].numel()) ** 0.5
        elif old.is_floating_point():
            state[name] = 0.1 * numbers(*old.shape) + (0 if name.endswith(("bias", "mean")) else 1)
    net.load_state_dict(state)
    return net.eval()


def test_features_are_those_of_torch_fidelity():
    """Reference: FeatureExtractorInceptionV3 of torch-fidelity 0.4.0 with these weights and these 8-bit pictures."""
    pictures = ((numbers(2, 3, 40, 52) + 1) * 127.5).round()
    with torch.no_grad():
        features = made_up(FidInception())(pictures / 255)
    assert features.shape == (2, 2048)
    found = features[0, :8].tolist() + features[1, -8:].tolist() + [features.mean().item(), features.std().item()]
    assert found == pytest.approx(REFERENCE, rel=1e-3, abs=1e-4)


def test_resizing_places_pixels_as_tensorflow_1_did():
    """Output pixel i lies at i * 2 / 4: 0, 0.5, 1, and 1.5, which is beyond the last one."""
    x = torch.tensor([[[[0.0, 8.0], [4.0, 12.0]]]])
    assert resize_as_tensorflow_1(x, 4)[0, 0].tolist() == [[0, 4, 8, 8], [2, 6, 10, 10], [4, 8, 12, 12], [4, 8, 12, 12]]
