"""``--junit``: a verification as the JUnit XML that CI systems show, one test case for each case and each check."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple
from xml.etree import ElementTree

if TYPE_CHECKING:
    from diffdeploy.selftest import SelfTest
    from diffdeploy.verify import CaseReport, Check, Report

__all__ = ["Verdict", "junit", "of_cases", "of_report", "of_self_test"]


class Verdict(NamedTuple):
    """One test case.

    Attributes:
        group: what it belongs to, the ``classname`` in XML.
        name: its name within the group.
        failure: why it failed; ``None`` if it passed.
        said: finding, if it passed.
    """

    group: str
    name: str
    failure: str | None
    said: str = ""


def of_report(report: "Report") -> list[Verdict]:
    """Test cases for the checks of structure and properties, then for the verification's cases."""
    return [*map(_of_check, report.contract), *of_cases(report.cases)]


def of_cases(cases: "Iterable[CaseReport]") -> list[Verdict]:
    """Test cases for numerical comparisons, grouped by what they test."""
    return [Verdict(f"cases: {case.group}", case.id, _failure(case), _figures(case)) for case in cases]


def of_self_test(result: "SelfTest") -> list[Verdict]:
    """Test cases for faults; each must be caught, unless it can be detected only by chance."""
    return [
        Verdict(
            f"faults: {fault.family}",
            fault.name,
            None if fault.caught or not fault.provable else f"was not caught: {fault.breaks}",
            f"caught by {', '.join(fault.by)}"
            if fault.caught
            else ""
            if fault.provable
            else "detectable only by chance",
        )
        for fault in result.faults
    ]


def _of_check(check: "Check") -> Verdict:
    return Verdict("checks", check.name, None if check.passed else check.detail, check.detail)


def _failure(case: "CaseReport") -> str | None:
    wrong = [output.failure for output in case.outputs if not output.passed]
    return "; ".join(wrong) or None


def _figures(case: "CaseReport") -> str:
    return "" if case.budget_used is None else f"used {case.budget_used:.1%} of its error budget"


def junit(suite: str, properties: dict[str, str], testcases: Iterable[Verdict]) -> bytes:
    """Format the JUnit file.

    Args:
        suite: name of the suite.
        properties: facts of the run, by name.
        testcases: test cases, in order.

    Returns:
        XML in UTF-8.
    """
    testcases = list(testcases)
    failed = sum(testcase.failure is not None for testcase in testcases)
    counts = {"tests": str(len(testcases)), "failures": str(failed), "errors": "0", "skipped": "0"}
    root = ElementTree.Element("testsuites", {"name": "diffdeploy verify", **counts})
    element = ElementTree.SubElement(root, "testsuite", {"name": _legal(suite), **counts})
    said = ElementTree.SubElement(element, "properties")
    for name, value in properties.items():
        ElementTree.SubElement(said, "property", {"name": name, "value": _legal(value)})
    for group, name, failure, found in testcases:
        # Most viewers split a class name into folders at its dots.
        attributes = {"classname": _legal(group.replace(".", "_")), "name": _legal(name)}
        case = ElementTree.SubElement(element, "testcase", attributes)
        if failure is not None:
            ElementTree.SubElement(case, "failure", {"message": _legal(failure), "type": "verification"})
        elif found:
            ElementTree.SubElement(case, "system-out").text = _legal(found)
    ElementTree.indent(root)
    data: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return data + b"\n"


def _legal(text: str) -> str:
    # Names from files may contain characters that XML does not allow.
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
