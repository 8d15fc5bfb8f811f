from collections.abc import Iterator

import pytest
import torch

from tests.faults.lab import Lab, open_lab
from tests.s3 import S3Server


@pytest.fixture(scope="package")
def lab(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Makes this process use the S3 server of the lab during the tests of this package."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        s3.use(patch)
        with open_lab(tmp_path_factory.mktemp("faults"), s3) as opened:
            yield opened
    torch.set_num_threads(threads)  # the undisturbed run changes it to the setting of workers
