"""``diffdeploy bench MODEL_BUNDLE``: prefill and decode of whole models, side by side."""

import json
from typing import TYPE_CHECKING, Any

from diffdeploy.cli import console
from diffdeploy.cli.bench_view import change_fields, print_changes
from diffdeploy.cli.progress import Activity, activity
from diffdeploy.errors import DiffDeployError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffdeploy.bench.models import ModelBench, ModelBenchRequest, ModelReport, ModelRow
    from diffdeploy.cli.bench import Outputs

__all__ = ["bench_models", "refuse_options_of_blocks"]

_HEADINGS = ("candidate", "ms", "±", "ratio", "95 %", "tokens/s", "generate overhead")


def refuse_options_of_blocks(given: dict[str, Any]) -> None:
    """Refuse options that apply only to blocks.

    Args:
        given: value of each option by its name; ``None`` if it was not given.

    Raises:
        InputError: one was given.
    """
    if others := [name for name, value in given.items() if value is not None]:
        pronoun = "it" if len(others) == 1 else "them"
        raise InputError(f"{', '.join(others)} cannot be used with a bundle of a whole model; omit {pronoun}")


def bench_models(
    request: "ModelBenchRequest",
    outputs: "Outputs",
    measure: "Callable[[ModelBench, Activity], KeyboardInterrupt | DiffDeployError | None]",
) -> "tuple[ModelReport, KeyboardInterrupt | DiffDeployError | None]":
    """Measure, write and print.

    Args:
        request: the user's request.
        outputs: destinations of the result.
        measure: function that runs the benchmark to the end, or returns the failure that stopped it.

    Raises:
        DiffDeployError: the request cannot be measured.
    """
    from diffdeploy.bench.models import prepare_models, read_model_report

    old = None if outputs.compare is None else read_model_report(outputs.compare)
    with activity("opening the bundles") as doing:
        left_out: list[str] = []
        run = prepare_models(request, left_out.append)
        if old is not None:
            _require_comparable(old, run)
        # Printed only after all checks, when the run is certain to start.
        for reason in left_out:
            console.note(reason)
        failure = measure(run, doing)
    report = run.report()
    if report is None:
        # Nothing was measured, so there is no result to print before the error.
        raise failure if isinstance(failure, DiffDeployError) else KeyboardInterrupt("nothing was measured")
    _write(report, old, outputs)
    return report, failure


def _require_comparable(old: "ModelReport", run: "ModelBench") -> None:
    from diffdeploy.bench.changes import require_equal

    require_equal(
        ("model", old.model.model_copy(update={"source": run.model.source}), run.model),
        ("dtype", old.dtype, run.plan.dtype),
        ("baseline", old.baseline, run.plan.baseline),
        ("number of threads", old.environment.threads, run.plan.threads),
    )


def _write(report: "ModelReport", old: "ModelReport | None", outputs: "Outputs") -> None:
    from diffdeploy.bench.changes import changes_of_rows

    if outputs.save is not None:
        # Files are written first, since a closed pipe ends the command at the first printed line.
        outputs.save.write_text(json.dumps(report.fields(), indent=2, allow_nan=False) + "\n")
    if outputs.csv is not None:
        outputs.csv.write_text(report.to_csv())
    changes = None if old is None else changes_of_rows(old.results, report.results, report.baseline)
    if outputs.as_json:
        found = report.fields()
        console.print_json(found if changes is None else {**found, "changes": change_fields(changes)})
        return
    for size in report.sizes:
        what = "prompt of" if size.what == "prefill" else "one token after"
        rows = [_figures(row) for row in report.rows_of(size)]
        console.print_figures(f"{size.what}: {what} {size.length} tokens, batch {size.batch_size}", _HEADINGS, rows)
    for row in report.results:
        if row.status == "wrong":
            console.print_text(f"{row.name} is wrong at {row.size.id} and was not timed there: {row.reason}")
    console.print_rows(_legend(report))
    if changes is not None:
        print_changes(changes)


def _figures(row: "ModelRow") -> list[str]:
    if row.latency_ms is None:
        return [row.name, "wrong" if row.status == "wrong" else "not timed", *[""] * 5]
    spread = None if row.latency_iqr_ms is None else row.latency_iqr_ms / 2 / row.latency_ms
    known = row.ratio_low is not None and row.ratio_high is not None
    return [
        row.name,
        f"{row.latency_ms:.3g}",
        "-" if spread is None else f"{spread:.1%}",
        "-" if row.ratio is None else f"{row.ratio:.3f}",
        f"{row.ratio_low:.3f}-{row.ratio_high:.3f}" if known else "-",
        "-" if row.tokens_per_second is None else f"{row.tokens_per_second:.4g}",
        "-" if row.generate_overhead is None else f"{row.generate_overhead:+.1%}",
    ]


def _legend(report: "ModelReport") -> list[tuple[str, str]]:
    from diffdeploy.bench.table import machine_rows

    model = report.model
    said = (
        f"{model.source}: {model.num_layers} layers, D {model.embed_dim}, h {model.num_heads}, h_kv "
        f"{model.num_kv_heads}, d {model.head_dim}, {model.vocab_size} tokens, "
        f"{model.num_parameters / 1e6:.3g} million parameters; {report.dtype}"
    )
    return [
        ("model", said),
        *machine_rows(report.environment, report.dtype),
        (
            "ms",
            "median over rounds, in which all candidates take turns, per prompt or per token; ± half the interquartile "
            "range",
        ),
        ("ratio", f"median of the ratios to {report.baseline} in the same round, with its 95 % confidence interval"),
        ("generate overhead", "extra time of generate, relative to the runtime calls that it makes"),
    ]
