"""The report of a training."""

from pathlib import Path

from jobs.reports.training import TrainReport


def test_a_run_that_is_stopped_before_its_first_log_row_has_no_report_and_no_error(tmp_path: Path):
    TrainReport(str(tmp_path), [], 0).close()
    assert not (tmp_path / "reports").exists()


def test_a_run_with_one_row_shows_its_numbers(tmp_path: Path):
    report = TrainReport(str(tmp_path), [], 0)
    report.log({"step": 1, "loss": 2.0, "seconds_per_step": 0.1})
    report.close()
    page = (tmp_path / "reports/train.html").read_text()
    assert "<svg" not in page  # one point is no curve
    assert '<div class="value">2</div>' in page
    assert list((tmp_path / "reports/tensorboard").iterdir())
