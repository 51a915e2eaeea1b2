"""Differences between two bundles or two reports: figures, checks, versions, graph, files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffdeploy.bundle import REPORT, Manifest, open_bundle
from diffdeploy.runtime import least_versions
from diffdeploy.verify.report import Report, files_judged, read_report

__all__ = ["Described", "Difference", "differences", "read_described"]


@dataclass(frozen=True)
class Described:
    """A bundle or a report to compare; a bundle that was never verified has no report."""

    path: Path
    manifest: Manifest | None
    report: Report | None


@dataclass(frozen=True)
class Difference:
    """One difference.

    Attributes:
        section: ``bundle``, ``files``, ``graph``, ``config``, ``options``, ``requires``, ``versions``,
            ``verification``, ``checks`` or ``figures``.
        name: dotted name of what differs.
        before: its value in the first; ``None`` if absent.
        after: its value in the second; ``None`` if absent.
    """

    section: str
    name: str
    before: Any
    after: Any


def read_described(path: Path) -> Described:
    """Open a bundle or a report.

    Raises:
        InputError: the path is neither.
        IntegrityError: the bundle is not what was exported.
    """
    if not path.is_dir():
        return Described(path, None, read_report(path))
    manifest = open_bundle(path).manifest
    report = read_report(path / REPORT) if REPORT in manifest.files else None
    return Described(path, manifest, report)


def differences(one: Described, other: Described) -> list[Difference]:
    """List everything that differs, section by section; sections that only one of the two has are omitted.

    Args:
        one: first bundle or report.
        other: second bundle or report, which may be of the other kind.
    """
    changes = []
    befores, afters = _sections(one), _sections(other)
    for section in befores.keys() & afters.keys():
        before, after = befores[section], afters[section]
        changes += [
            Difference(section, name, before.get(name), after.get(name))
            for name in dict.fromkeys([*before, *after])
            if before.get(name) != after.get(name)
        ]
    # Sets would not preserve the order of the sections.
    order = list(befores)
    return sorted(changes, key=lambda change: order.index(change.section))


def _sections(subject: Described) -> dict[str, Mapping[str, Any]]:
    manifest, report = subject.manifest, subject.report
    sections: dict[str, Mapping[str, Any]] = {}
    if manifest is not None:
        fields = manifest.model_dump(mode="json")
        sections |= {
            "bundle": {"verified": manifest.verified},
            "files": files_judged(manifest),
            "graph": _flat({"format": manifest.format, **fields["graph"]}),
            "config": _flat(fields["config"]),
            "options": _flat(fields["options"]),
            "requires": least_versions(manifest),
            "versions": _flat(fields["environment"]),
        }
    if report is not None:
        # What a bundle says about its own files takes precedence over the report inside it.
        sections.setdefault("files", report.files)
        sections.setdefault("versions", _flat(report.environment.model_dump(mode="json")))
        judged = report.model_dump(include={"format", "dtype", "backend", "seed", "selection", "budget"})
        sections |= {
            "artifact": report.graph.model_dump(),
            "verification": _flat({"passed": report.passed, **judged}),
            "checks": {check.name: "passed" if check.passed else check.detail for check in report.contract},
            "figures": _figures(report),
        }
    return sections


def _figures(report: Report) -> dict[str, Any]:
    """Figures of each output of each case, as one value."""
    # One value, so that an output that differs takes one line, and not one line for each figure.
    return {
        f"{case.id} {output.output}": output.model_dump(mode="json", exclude={"output"})
        for case in report.cases
        for output in case.outputs
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
            value = {str(number): each for number, each in enumerate(value)}
        if isinstance(value, Mapping):
            leaves |= _flat(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = value
    return leaves
