"""``verify --html``: one page that holds the whole verdict and needs nothing else."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

from diffdeploy.cli.main import main
from diffdeploy.cli.report_page import page
from diffdeploy.locate import Finding, StageError
from diffdeploy.verify import Report, read_report
from tests.support.commands import refused

pytestmark = pytest.mark.usefixtures("_in_an_empty_folder")

EVIL = "</title><script>alert(1)</script>\x1b[2J"
VOID = {"meta", "br", "img", "link"}


class Reader(HTMLParser):
    """Collects texts and attributes, and sees that every element is closed."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(data.decode())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def wrong(report: Report) -> Report:
    """As a report is whose first case failed, and whose third stage deviates."""
    first = report.cases[0]
    changes = {"passed": False, "budget_used": 4e4, "worst_index": [0, 0, 1]}
    case = first.model_copy(update={**changes, "outputs": [first.outputs[0].model_copy(update=changes)]})
    stages = [
        StageError(stage=name, rmse=rmse, eager_rmse=1e-7, amplification=rmse / 1e-7, deviates=rmse > 1e-3, node=EVIL)
        for name, rmse in (("q projection", 1e-7), ("rope", 2e-7), ("difference", 0.5))
    ]
    finding = Finding(stage="difference", found_by="intermediate values", detail="it is far off", stages=stages)
    return report.model_copy(update={"cases": [case, *report.cases[1:]], "guilty": finding})


def test_everything_is_on_the_page(sample_bundle: Path) -> None:
    stored = sample_bundle / "verification.json"
    assert main(["verify", "--from-report", str(stored), "--html", "out.html"]) == 0
    report = read_report(stored)
    data = Path("out.html").read_bytes()
    said = "\n".join(Reader(data).texts)
    for case in report.cases:
        assert f"{case.id}: {case.budget_used:.1%} of the budget" in said
        assert case.group in said
    for check in report.contract:
        assert check.detail in said
    for part in report.coverage:
        assert f"{part.declared.min} to {part.declared.max}" in said
    assert all(name in said and found in said for name, found in report.environment.packages.items())
    assert all(digest in said for digest in report.files.values())
    assert data == page(report, stored)


def test_the_page_reaches_nothing_outside(sample_bundle: Path) -> None:
    """Neither a script nor a link, whatever names out of files hold."""
    report = wrong(read_report(sample_bundle / "verification.json"))
    reader = Reader(page(report, Path(EVIL)))
    assert not reader.tags & {"script", "link", "img", "iframe", "object", "image", "use", "a", "form"}
    assert not {name for name, _ in reader.attributes} & {"src", "href", "xlink:href", "srcset", "onload", "onclick"}
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in reader.attributes
    said = "".join(reader.texts)
    assert "\x1b" not in said
    assert "<script>alert(1)" in said
    assert "url(" not in said


def test_a_failure_is_seen(sample_bundle: Path) -> None:
    report = wrong(read_report(sample_bundle / "verification.json"))
    reader = Reader(page(report, sample_bundle))
    said = "\n".join(reader.texts)
    assert ("class", "verdict failed") in reader.attributes
    assert sum(attribute == ("class", "failed") for attribute in reader.attributes) == 2  # a cross and a stage
    assert "the error of output is 4e+04 times the allowed one, largest at [0, 0, 1]" in said
    assert "WRONG" in said


def test_a_page_of_something_else_is_refused(sample_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = str(sample_bundle)
    assert "cannot be combined with --html" in refused(["verify", bundle, "--self-test", "--html", "x.html"], capsys)
    assert "cannot be combined with --html" in refused(
        ["verify", bundle, "--engine", "genai", "--html", "x.html"], capsys
    )
    assert "there is no folder nowhere" in refused(["verify", bundle, "--html", "nowhere/x.html"], capsys)
