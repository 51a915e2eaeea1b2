"""``verify --junit``: what CI systems read of a verification."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from diffdeploy.cli.junit import Verdict, junit, of_self_test
from diffdeploy.cli.main import main
from diffdeploy.selftest.results import FaultResult, SelfTest
from diffdeploy.verify import read_report
from tests.support.commands import refused

pytestmark = pytest.mark.usefixtures("_in_an_empty_folder")


def suite_of(path: Path) -> ElementTree.Element:
    root = ElementTree.fromstring(path.read_bytes())
    assert root.tag == "testsuites"
    (suite,) = root
    testcases, failures = suite.findall("testcase"), suite.findall("testcase/failure")
    for element in (root, suite):
        assert (element.get("tests"), element.get("failures")) == (str(len(testcases)), str(len(failures)))
    return suite


def test_one_test_case_for_each_check_and_case(sample_bundle: Path) -> None:
    report = read_report(sample_bundle / "verification.json")
    assert main(["verify", "--from-report", str(sample_bundle / "verification.json"), "--junit", "out.xml"]) == 0
    suite = suite_of(Path("out.xml"))
    named = [(case.get("classname"), case.get("name")) for case in suite.findall("testcase")]
    assert named == [
        *(("checks", check.name) for check in report.contract),
        *((f"cases: {case.group}", case.id) for case in report.cases),
    ]
    assert {prop.get("name"): prop.get("value") for prop in suite.findall("properties/property")}["dtype"] == "float32"


def test_a_failure_says_what_is_wrong_and_exits_as_before(sample_bundle: Path) -> None:
    stored = str(sample_bundle / "verification.json")
    assert main(["verify", "--from-report", stored, "--k", "0.001", "--junit", "out.xml"]) == 1
    suite = suite_of(Path("out.xml"))
    failed = [case for case in suite.findall("testcase") if case.find("failure") is not None]
    report = read_report(sample_bundle / "verification.json")
    assert 0 < len(failed) < len(report.cases) + len(report.contract)
    message = failed[0].find("failure")
    assert message is not None
    assert "times the allowed one" in (message.get("message") or "")
    assert main(["verify", "--from-report", stored, "--k", "0.001", "--junit", "out.xml", "--warn-only"]) == 0
    assert len(suite_of(Path("out.xml")).findall("testcase/failure")) == len(failed)


def test_a_run_without_a_verdict_leaves_no_file(bundle_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not even an earlier one, which would be taken for this run's."""
    assert main(["verify", str(bundle_copy), "--cases", "1", "--junit", "out.xml"]) == 0
    assert Path("out.xml").is_file()
    with (bundle_copy / "model.onnx").open("ab") as stream:
        stream.write(b"x")
    assert main(["verify", str(bundle_copy), "--junit", "out.xml"]) == 5
    assert list(Path.cwd().iterdir()) == []


def test_what_cannot_be_written_is_refused_before_the_run(
    sample_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, message in (("nowhere/out.xml", "there is no folder nowhere"), (".", "is a folder")):
        assert message in refused(["verify", str(sample_bundle), "--junit", path], capsys)


def test_names_that_xml_cannot_hold() -> None:
    evil = "a\x00\x1b[2J\ud800<&>\"'ö"
    data = junit(evil, {"k": evil}, [Verdict(evil, evil, evil), Verdict("g.h", "n", None, evil)])
    suite = ElementTree.fromstring(data)[0]
    said = "a\\x00\\x1b[2J\\ud800<&>\"'ö"
    assert suite.get("name") == said
    first, second = suite.findall("testcase")
    assert first.get("name") == said
    assert second.get("classname") == "g_h"
    assert second.findtext("system-out") == said


def test_a_fault_that_was_missed_is_a_failure() -> None:
    def fault(name: str, *, caught: bool, provable: bool = True) -> FaultResult:
        return FaultResult(
            name=name,
            place="graph",
            family="graph",
            provable=provable,
            breaks="lambda is another",
            caught=caught,
            by=["check lambda"] if caught else [],
            reason=None,
            stage=None,
            expected_stage=None,
            located=None,
            found_by=None,
        )

    faults = [fault("a", caught=True), fault("b", caught=False), fault("c", caught=False, provable=False)]
    assert of_self_test(SelfTest.of(faults, [])) == [
        Verdict("faults: graph", "a", None, "caught by check lambda"),
        Verdict("faults: graph", "b", "was not caught: lambda is another"),
        Verdict("faults: graph", "c", None, "detectable only by chance"),
    ]
