"""`ray job submit` to a cluster of several nodes with token authentication."""

import json
import re
import subprocess
import urllib.error
import urllib.request

import pytest

from tests.faults.cluster import RAY, Cluster
from tests.faults.corpus import Damage
from tests.faults.lab import JOB_S, ROOT, Lab, Trial

SUBMIT = ("job", "submit", "--working-dir", ".", "--", "python", "-m", "jobs", "tokenize")


def submit(trial: Trial, *changes: str) -> subprocess.CompletedProcess[str]:
    """Runs `ray job submit` in the repository root, as a user would."""
    cluster = trial.lab.cluster
    return subprocess.run(
        [str(RAY), *SUBMIT, *trial.arguments, *changes],
        cwd=ROOT,
        env={**cluster.client_environment(), "RAY_ADDRESS": cluster.dashboard},
        timeout=JOB_S,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def job_details(cluster: Cluster, output: str) -> dict:
    """The cluster's record of the job in the output of `ray job submit`."""
    submission = re.findall(r"raysubmit_\w+", output)[0]
    request = urllib.request.Request(f"{cluster.dashboard}/api/jobs/{submission}")
    request.add_header("Authorization", f"Bearer {cluster.token}")
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


@pytest.mark.faults
def test_a_submitted_job_succeeds_and_its_log_ends_with_the_result(lab: Lab):
    trial = lab.trial("submitted")
    done = submit(trial, "storage.options.s3.config_kwargs.read_timeout=20")  # options reach the workers of a job
    assert done.returncode == 0, done.stdout
    assert "\ntokenize: done\n" in done.stdout
    assert job_details(lab.cluster, done.stdout)["driver_exit_code"] == 0
    assert trial.damage() == Damage(0, 0, 0)


@pytest.mark.faults
def test_the_exit_code_of_a_submitted_job_is_in_its_last_line(lab: Lab):
    """`ray job submit` itself exits with 1, whatever the exit code of the job was."""
    done = submit(lab.trial("submitted"), f"data.shards={lab.folder}/missing.tar")
    assert done.returncode == 1, done.stdout
    assert "\ntokenmill tokenize: exit 2: a mistake" in done.stdout
    assert job_details(lab.cluster, done.stdout)["driver_exit_code"] == 2


@pytest.mark.faults
def test_submitting_without_the_token_is_refused(lab: Lab):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{lab.cluster.dashboard}/api/jobs/", timeout=30)
