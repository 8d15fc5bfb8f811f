import pytest

from tests.jobs.helpers import save_tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny frozen tokenizer."""
    return save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizers") / "tiny")
