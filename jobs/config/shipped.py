"""Finds configuration files that ship with Tokenmill, and method files beside the YAML that names them."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf


def shipped_configs() -> Path:
    """The folder `configs/` of the checkout, or the copy of it that a wheel installs in `tokenmill/configs/`."""
    root = Path(__file__).resolve().parents[2]
    installed = root / "tokenmill" / "configs"
    return installed if installed.is_dir() else root / "configs"


def with_methods_beside(loaded: DictConfig, folder: Path) -> DictConfig:
    """loaded, with the path of each `compare.methods` file that exists in folder. folder holds loaded's own YAML."""
    compare: Any = OmegaConf.to_container(loaded, resolve=False).get("compare")  # type: ignore[union-attr]
    methods = compare.get("methods") if isinstance(compare, dict) else None
    for label, method in methods.items() if isinstance(methods, dict) else ():
        file = method.get("file") if isinstance(method, dict) else method
        if isinstance(file, str) and (folder / file).is_file():
            path = str(folder / file)
            loaded.compare.methods[label] = {**method, "file": path} if isinstance(method, dict) else path
    return loaded
