"""``diffdeploy verify BUNDLE --self-test``: does the verification see what can be wrong with this bundle?"""

from pathlib import Path
from typing import TYPE_CHECKING

from diffdeploy.cli import console
from diffdeploy.cli.junit import of_self_test
from diffdeploy.cli.progress import activity
from diffdeploy.cli.report_files import ReportFiles
from diffdeploy.cli.report_tables import print_families, print_faults
from diffdeploy.errors import VerificationError

if TYPE_CHECKING:
    from diffdeploy.formats import RunOptions

__all__ = ["run_self_test"]


def run_self_test(bundle: Path, run_options: "RunOptions", files: ReportFiles, *, as_json: bool) -> int:
    """Inject every fault that the bundle could have into copies of it, and print which were caught.

    Returns:
        The exit code: 0 only if every fault was caught.

    Raises:
        DiffDeployError: there is no bundle, or it fails verification even without a fault.
    """
    files.check()
    with activity("verifying the bundle as it is") as doing:
        from diffdeploy.selftest import self_test

        def trial(done: int, total: int, name: str) -> None:
            doing.phase("verifying copies with faults")
            doing.progress(done, total, name)

        result = self_test(bundle, run_options=run_options, progress=trial)
    files.write_junit(bundle, {}, of_self_test(result))
    print_faults(result.faults)
    print_families(result.families)
    # Faults that share a reason are printed together, in the order of their first occurrence.
    for reason in dict.fromkeys(skipped.reason for skipped in result.skipped):
        names = [skipped.name for skipped in result.skipped if skipped.reason == reason]
        console.note(f"{len(names)} faults were not injected, since {reason}: {', '.join(names)}")
    if as_json:
        console.print_json(
            {
                "status": "passed" if result.passed else "failed",
                "bundle": str(bundle),
                "self_test": result.model_dump(mode="json"),
            }
        )
    verdict = (
        f"{result.caught} of {result.injected} faults caught, {result.located} of {result.with_stage} located: {bundle}"
    )
    if not as_json:
        console.print_text(verdict)
    if result.passed:
        return 0
    missed = [fault.name for fault in result.faults if fault.provable and not fault.caught]
    console.fail(f"the verification of {bundle} does not detect {', '.join(missed) or 'anything'}; do not rely on it")
    return VerificationError.exit_code
