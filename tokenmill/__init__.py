"""Tokenmill turns image and audio corpora into discrete tokens.

    from tokenmill import TokenDataset   # reads token shards; needs numpy, pyarrow and fsspec only
    from tokenmill import pack, mix      # blocks of tokens for language models; likewise
    from tokenmill import Tokenizer      # encodes and decodes; needs `pip install 'tokenmill[tokenizer]'`

Both load on first use: `import tokenmill` imports neither torch nor ray.
"""

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmill.extras import explain

if TYPE_CHECKING:
    from pipeline.sequences import flatten, mix, pack, unflatten
    from pipeline.tokens import TokenDataset, collate
    from tokenmill.tokenizer import Tokenizer

__all__ = ["TokenDataset", "Tokenizer", "__version__", "collate", "flatten", "mix", "pack", "unflatten"]
__version__ = "0.1.0"  # the build reads the version from here

_HOME = {
    "Tokenizer": "tokenmill.tokenizer",
    **dict.fromkeys(("TokenDataset", "collate"), "pipeline.tokens"),
    **dict.fromkeys(("flatten", "mix", "pack", "unflatten"), "pipeline.sequences"),
}
_ROOT = Path(__file__).resolve().parent.parent


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tokenmill' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOME[name]), name)
    except ImportError as error:
        raise explain(error, f"tokenmill.{name}") from error


def __dir__() -> list[str]:
    return __all__


def _refuse_shadowed_packages() -> None:
    """Raises ImportError if `tokenizer`, `pipeline` or `jobs` is not the package next to this one."""
    for name in ("tokenizer", "pipeline", "jobs"):
        spec = importlib.util.find_spec(name)
        found = spec.origin if spec else None
        if found is None or Path(found).resolve() != _ROOT / name / "__init__.py":
            raise ImportError(
                f"`import {name}` finds {found or 'nothing'} instead of Tokenmill's {_ROOT / name}: "
                f"uninstall or rename the other {name!r}, or install Tokenmill in a fresh virtual environment"
            )


_refuse_shadowed_packages()
