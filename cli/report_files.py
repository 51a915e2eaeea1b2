"""The files that ``verify`` writes besides its verdict: the report itself, and formats that other tools read."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffdeploy.cli.junit import Verdict, junit, of_report
from diffdeploy.cli.report_page import page

if TYPE_CHECKING:
    from diffdeploy.verify import Report

__all__ = ["ReportFiles"]


@dataclass(frozen=True, kw_only=True)
class ReportFiles:
    """Paths of the files; ``None`` for those that were not requested."""

    save_report: Path | None
    junit: Path | None
    html: Path | None

    def check(self) -> None:
        """Check that all files can be written, since the verification that follows takes minutes.

        Raises:
            InputError: a file cannot be written.
        """
        from diffdeploy.files import check_writable

        for path in (self.save_report, self.junit, self.html):
            if path is not None:
                check_writable(path)
        # If this run ends without a verdict, CI would mistake the files of an earlier run for its own.
        for path in (self.junit, self.html):
            if path is not None:
                path.unlink(missing_ok=True)

    def write(self, report: "Report", subject: Path) -> None:
        """Write all files, each completely or not at all.

        Raises:
            UnavailableError: a file cannot be written.
        """
        from diffdeploy.files import write_whole

        if self.save_report is not None:
            write_whole(self.save_report, report.to_bytes())
        if self.html is not None:
            write_whole(self.html, page(report, subject))
        properties = {
            "format": report.format,
            "dtype": report.dtype,
            "backend": report.backend,
            "seed": str(report.seed),
            "selection": report.selection,
        }
        self.write_junit(subject, properties, of_report(report))

    def write_junit(self, subject: Path, properties: dict[str, str], testcases: Iterable[Verdict]) -> None:
        """Write the JUnit file alone, if it was asked for."""
        from diffdeploy.files import write_whole

        if self.junit is not None:
            write_whole(self.junit, junit(str(subject), properties, testcases))
