from collections.abc import Iterator

import pytest
import torch

from tests.jobs.helpers import save_tiny_tokenizer


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Like the workers: the last bit of a sum depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny tokenizer."""
    return save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizers") / "tiny")
