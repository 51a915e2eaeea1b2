"""No false alarm: a fixed sample of the campaign of `tests.campaign`, and that a campaign goes on where it stopped."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from diffdeploy.verify import Report
from diffdeploy.verify.report import read_report
from tests import campaign
from tests.campaign import Run
from tests.support.pairwise import rest_is_slow


@pytest.mark.parametrize("number", rest_is_slow([26, 1, 7]))
def test_right_exports_pass(number: int) -> None:
    """Of these numbers the formats are onnx, pt2 and onnx-ort; the last has weights too large to be folded twice."""
    for run in campaign.runs_of_export(number, seeds=2):
        assert run.report.passed, run.report.first_failure()


def test_a_campaign_goes_on_where_it_was_stopped(
    sample_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = read_report(sample_bundle / "verification.json")
    exports = []

    def runs_of_export(number: int, seeds: int, *, cases: object) -> Iterator[Run]:
        exports.append(number)
        yield from (Run(number * seeds + seed, "onnx", report) for seed in range(seeds))

    monkeypatch.setattr(campaign, "runs_of_export", runs_of_export)
    output = tmp_path / "deep" / "campaign.jsonl"
    assert campaign.campaign(10, 0.0, output) == []
    assert len(campaign.campaign(10, 60.0, output)) == 10
    runs = campaign.campaign(20, 60.0, output)
    assert exports == [0, 1, 2, 3]
    assert campaign.read_runs(output) == runs
    assert [run.number for run in runs] == list(range(20))


def test_the_table_counts_alarms(sample_bundle: Path) -> None:
    report = read_report(sample_bundle / "verification.json")
    failed = report.contract[0].model_copy(update={"passed": False})
    alarm: Report = report.with_check(failed)
    lines = campaign.table([Run(0, "onnx", report), Run(1, "onnx", alarm), Run(2, "pt2", report)]).splitlines()
    assert lines[1].split()[:5] == ["onnx", "float32", "2", str(2 * len(report.cases)), "1"]
    assert lines[2].split()[:5] == ["pt2", "float32", "1", str(len(report.cases)), "0"]
    assert lines[3] == f"3 runs, {3 * len(report.cases)} outputs of cases, 1 false alarms"
