from collections.abc import Iterator

import pytest
import torch

from tests.faults.lab import Lab, open_lab
from tests.s3 import S3Server


@pytest.fixture(scope="package")
def lab(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """During the tests of this package, this process talks to the lab's S3 server."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        s3.use(patch)
        with open_lab(tmp_path_factory.mktemp("faults"), s3) as opened:
            yield opened
    torch.set_num_threads(threads)  # the undisturbed run has set it as workers have it
