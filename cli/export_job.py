"""Running exports: one bundle, or one for each layer of a checkpoint."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdeploy.cli import console
from diffdeploy.cli.interrupts import keeping, kept_sentence
from diffdeploy.cli.progress import Activity, activity
from diffdeploy.cli.report_output import finish, graph_fields, loss_fields, report_fields
from diffdeploy.errors import DiffDeployError, VerificationError

if TYPE_CHECKING:
    from diffdeploy.checkpoints import Checkpoint, CheckpointOptions, ModelCheckpoint
    from diffdeploy.exporters import Export, ExportOptions
    from diffdeploy.verify import RejectedError, Report

__all__ = ["Job", "Outcome", "export_all"]


@dataclass(frozen=True)
class Outcome:
    """Result of one export: the bundle, or the report that rejected it."""

    target: Path
    format_name: str
    export: "Export | None"
    rejected: "RejectedError | None"

    @property
    def report(self) -> "Report | None":
        """Report of the verification, if there was one."""
        if self.rejected is not None:
            return self.rejected.report
        return None if self.export is None else self.export.report

    @property
    def fields(self) -> dict[str, Any]:
        """Fields for JSON."""
        if self.report is not None:
            return report_fields(self.report, self.target)
        assert self.export is not None
        loss = self.export.loss
        return {
            "status": "unverified",
            "format": self.format_name,
            "bundle": str(self.target),
            "graph": graph_fields(self.export.facts),
            "verification": {"passed": False, "num_cases": 0, "worst": None},
            **({} if loss is None else {"loss": loss_fields(loss)}),
        }

    def print_verdict(self) -> None:
        """Print the verdict as one line to standard output."""
        if self.report is None:
            if self.export is not None and self.export.loss is not None:
                console.note(f"loss from quantised weights: {self.export.loss.summary}")
            console.print_text(f"unverified: {self.target}; run diffdeploy verify {self.target} before using it")
        else:
            console.print_verdict(self.report, self.target)

    def finish(self, *, as_json: bool) -> int:
        """Print everything, and return the exit code."""
        if self.report is not None:
            error = None if self.rejected is None else str(self.rejected)
            code = finish(self.report, self.target, as_json=as_json, error=error)
            if self.export is not None and not as_json:
                self._note_next_steps()
            return code
        if as_json:
            console.print_json(self.fields)
        else:
            self.print_verdict()
        return 0

    def _note_next_steps(self) -> None:
        """Print the next commands for the bundle, ready to be copied."""
        assert self.export is not None
        place = shlex.quote(str(self.target))
        call = f"run {place} --input inputs.npz --output outputs.npz"
        if self.export.facts.num_layers:
            given = '--prompt "def main("' if (self.target / "tokenizer.json").is_file() else "--input-ids 1,2,3"
            call = f"generate {place} {given}"
        console.note(f"run it:   diffdeploy {call}")
        console.note(f"check it: diffdeploy verify {place}, on the machine that will run it")


@dataclass(frozen=True)
class Job:
    """One requested export."""

    checkpoint: Path
    reading: "CheckpointOptions"
    options: "ExportOptions"
    force: bool
    verify: bool

    @property
    def name(self) -> str:
        """Name of the checkpoint, for the default output."""
        # Resolved, so that `.` has a name.
        return self.checkpoint.resolve().name.removesuffix(self.checkpoint.suffix)

    def check_output(self, output: Path | None) -> None:
        """Check, before the checkpoint is read, that its bundle can be written.

        Raises:
            InputError: the bundle cannot be written.
        """
        from diffdeploy.bundle import check_output, default_output

        layer = self.reading.layer
        # The default output contains the layer of a block, which without --layer is known only after reading the keys.
        if output is None and layer is None and self.options.graph != "model":
            return
        check_output(output or default_output(self.name, layer, self.options.format), force=self.force)

    def read(self) -> "Checkpoint | ModelCheckpoint":
        """The block, or the whole model."""
        from diffdeploy.checkpoints import read_checkpoint, read_model

        if self.options.graph == "model":
            return read_model(self.checkpoint, self.reading)
        return read_checkpoint(self.checkpoint, self.reading)

    def settled(self, found: "Checkpoint | ModelCheckpoint") -> "Job":
        """The job, with open options filled in from the checkpoint."""
        from diffdeploy.exporters import settled_length

        length, reason = settled_length(self.options, found)
        if reason is not None:
            console.note(reason)
        return replace(self, options=replace(self.options, max_sequence_length=length))

    def run(self, output: Path | None) -> Outcome:
        """Read, export and verify, and show the progress."""
        from diffdeploy.bundle import default_output

        with activity("reading the checkpoint") as doing:
            found = self.read()
            target = output or default_output(self.name, found.layer, self.options.format)
            with keeping(target):
                return self.settled(found).export(found, target, doing)

    def export(self, found: "Checkpoint | ModelCheckpoint", target: Path, doing: Activity) -> Outcome:
        """Export and verify a block that has been read."""
        from diffdeploy.exporters import export_bundle
        from diffdeploy.verify import RejectedError

        try:
            done = export_bundle(
                found,
                target,
                self.options,
                force=self.force,
                verify=self.verify,
                phase=doing.phase,
                progress=doing.progress,
            )
        # Returned, not raised, since its report has to be printed; other errors have no report.
        except RejectedError as error:
            return Outcome(target, self.options.format, None, error)
        if self.options.weights is not None and done.loss is None:
            console.note("the loss from quantised weights was not measured: the checkpoint has no tokenizer.json")
        return Outcome(target, self.options.format, done, None)


def export_all(job: Job, output: Path | None, *, as_json: bool) -> int:
    """Export every layer to a folder of its own; failures are collected and listed at the end.

    Returns:
        The highest exit code of all layers.
    """
    from diffdeploy.bundle import default_output
    from diffdeploy.checkpoints import list_layers

    layers = list_layers(job.checkpoint, job.reading.layout)
    parent = output or default_output(job.name, None, job.options.format)
    results: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    kept: list[Path] = []
    interrupted = False
    for number, layer in enumerate(layers, start=1):
        console.note(f"layer {layer} ({number} of {len(layers)})")
        target = parent / f"layer{layer}"
        try:
            done = replace(job, reading=replace(job.reading, layer=layer)).run(target)
        except KeyboardInterrupt:
            interrupted = True
            break
        except DiffDeployError as error:
            # The next layers may be fine: a Phi-4 checkpoint has some that cannot be exported alone.
            failures.append({"layer": layer, "error": str(error), "exit_code": error.exit_code})
            continue
        results.append({"layer": layer, **done.fields})
        if done.rejected is not None:
            failures.append({"layer": layer, "error": str(done.rejected), "exit_code": VerificationError.exit_code})
            continue
        kept.append(target)
        # With --json, standard output is one JSON object.
        if not as_json:
            done.print_verdict()
    if as_json:
        status = "failed" if failures else "passed" if job.verify else "unverified"
        status = "interrupted" if interrupted else status
        console.print_json({"status": status, "bundles": results, "failures": failures})
    for failure in failures:
        # Printed at the end, so that the verdicts of other layers do not scroll them out of sight.
        console.fail(f"layer {failure['layer']}: {failure['error']}")
    if interrupted:
        console.fail(f"interrupted; {kept_sentence(kept)}")
        raise console.Ended(console.INTERRUPTED)
    return max((int(failure["exit_code"]) for failure in failures), default=0)
