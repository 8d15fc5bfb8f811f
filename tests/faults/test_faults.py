"""The short form of `make faults`: what no other test breaks, once, on one cluster."""

import pytest

from tests.faults.corpus import Damage
from tests.faults.kinds import run
from tests.faults.lab import Lab

SHORT = (
    pytest.param("driver and its Ray killed", marks=pytest.mark.slow),  # tests/jobs/test_resume.py kills drivers
    "workers killed",
    "node killed, with all workers",
    "two drivers, on S3",
    "S3: every quick fault",
)


@pytest.mark.faults
@pytest.mark.parametrize("kind", SHORT)
def test_every_sample_is_in_one_row_whatever_breaks(lab: Lab, kind: str):
    report = run(lab, kind, seed=0)
    assert report.faults > 0
    assert report.damage == Damage(lost=0, doubled=0, wrong=0)
    assert report.verified
