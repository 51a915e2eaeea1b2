"""Run self-tests on bundles of the sample in several formats, and write the table of all faults as a page.

``python scripts/self_test.py onnx onnx-ort pt2 aoti compile onnx-model --output docs/faults.md [--save FILE]``

Formats can be tested in several processes: each saves its results to a file, and a process without formats writes the
page from the files: ``python scripts/self_test.py --load FILE ... --output docs/faults.md``.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from diffdeploy.checkpoints import CheckpointOptions, read_checkpoint, read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.exporters import ExportOptions, export_bundle
from diffdeploy.formats import export_targets
from diffdeploy.selftest import FaultResult, SelfTest, all_faults, self_test

INTRODUCTION = """# Faults used to test the verification

`python scripts/self_test.py {formats} --output docs/faults.md` wrote this page. It introduces each fault into a copy of
a correct bundle (layer 1 of the sample, graph `cached`, or `masked` for `onnx-ort`, which has no `cached`; float32, at
most 4 rows and 70 positions), and verifies the copy.
`diffdeploy verify BUNDLE --self-test` does the same with your bundle.

The cells show what failed: checks by name, then the first case. If the verification named a wrong stage, or none, the
cell shows that in brackets. An empty cell means that the format cannot have the fault, or that the block would have to
be compiled again to introduce it; `make slow` introduces those faults into `aoti`, too.
"""


# Suffix of the name of a format, for a bundle of the whole sample.
OF_MODEL = "-model"


def run(format_name: str, folder: Path) -> tuple[SelfTest, float]:
    """Export the sample, test the verification with it, and measure the time."""
    path = folder / format_name
    target = export_targets()[format_name.removesuffix(OF_MODEL)]
    is_model = format_name.endswith(OF_MODEL)
    # Flavors other than the default have no cache for blocks.
    is_usual = target.name == target.format.name
    options = ExportOptions(
        format=target.format.name,
        onnx_flavor=target.flavor,
        graph="model" if is_model else "cached" if is_usual else "masked",
        # Small, since the largest cases take most of the time, but above 64, where faults of long sequences begin.
        max_batch_size=4,
        max_sequence_length=70,
    )
    # Not layer 0, which has no previous layer to be confused with.
    block = CheckpointOptions(layer=1)
    export_bundle(read_model(SAMPLE) if is_model else read_checkpoint(SAMPLE, block), path, options)
    start = time.monotonic()
    result = self_test(
        path,
        progress=lambda done, total, name: print(f"{format_name} {done + 1}/{total} {name}", flush=True),
    )
    return result, time.monotonic() - start


def cell(result: FaultResult | None) -> str:
    """Description of what caught a fault."""
    if result is None:
        return ""
    by = ", ".join(entry.removeprefix("check ").removeprefix("case ") for entry in result.by)
    # Named only if it is wrong, since the correct one has a separate column.
    named = f" ({result.stage or 'none'})" if result.located is False else ""
    missed = "**not seen**" if result.provable else "detectable only by chance"
    return (by if result.caught else missed) + named


def families(tests: dict[str, SelfTest]) -> list[str]:
    """Numbers of detected and introduced faults, by family and format."""
    counts = {name: {family.name: family for family in test.families} for name, test in tests.items()}
    lines = [f"| family | {' | '.join(f'`{name}`' for name in tests)} |", "|---" * (1 + len(tests)) + "|"]
    for family in dict.fromkeys(fault.family for fault in all_faults()):
        cells = [f"{c.caught} of {c.injected}" if (c := counts[name].get(family)) else "" for name in tests]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return lines


def page(tests: dict[str, tuple[SelfTest, float]]) -> str:
    """Create the whole page."""
    lines = [
        INTRODUCTION.format(formats=" ".join(tests)),
        "| format | introduced | caught | with a stage | located | seconds |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for name, (test, seconds) in tests.items():
        lines.append(
            f"| `{name}` | {test.injected} | {test.caught} | {test.with_stage} | {test.located} | {seconds:.0f} |"
        )
    blocks = {name: test for name, (test, _) in tests.items() if not name.endswith(OF_MODEL)}
    models = {name: test for name, (test, _) in tests.items() if name.endswith(OF_MODEL)}
    return "\n".join([*lines, *faults_of_blocks(blocks), *(faults_of_models(models) if models else [])]) + "\n"


def faults_of_models(tests: dict[str, SelfTest]) -> list[str]:
    """Table of the faults of whole models, in the order in which they were tried."""
    found = {name: {fault.name: fault for fault in test.faults} for name, test in tests.items()}
    lines = [
        "",
        "## Whole models",
        "",
        "These are faults of the sample with all its layers. For a fault in one layer, that layer is named.",
        "",
    ]
    lines += [f"| fault | in | what is wrong | where | {' | '.join(f'`{name}`' for name in tests)} |"]
    lines.append("|---" * (4 + len(tests)) + "|")
    every = {fault.name: fault for test in tests.values() for fault in test.faults}
    for name, fault in every.items():
        cells = [cell(of_format.get(name)) for of_format in found.values()]
        where = fault.expected_stage or ""
        lines.append(f"| `{name}` | {fault.place} | {fault.breaks} | {where} | {' | '.join(cells)} |")
    return lines


def faults_of_blocks(tests: dict[str, SelfTest]) -> list[str]:
    """Table of the faults of blocks."""
    lines = ["", *families(tests)]
    found = {name: {fault.name: fault for fault in test.faults} for name, test in tests.items()}
    lines += ["", f"| fault | in | what is wrong | stage | {' | '.join(f'`{name}`' for name in tests)} |"]
    lines.append("|---" * (4 + len(tests)) + "|")
    for fault in all_faults():
        cells = [cell(found[name].get(fault.name)) for name in tests]
        # The others are listed in one line below the table.
        if any(cells):
            lines.append(
                f"| `{fault.name}` | {fault.place} | {fault.breaks} | {fault.stage or ''} | {' | '.join(cells)} |"
            )
    others = [fault.name for fault in all_faults() if not any(fault.name in faults for faults in found.values())]
    listed = ", ".join(f"`{name}`" for name in others)
    lines += ["", f"These faults can occur in other blocks, but not in the one tested here: {listed}."]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("formats", nargs="*")
    parser.add_argument("--output", type=Path, help="page to write")
    parser.add_argument("--save", type=Path, help="file to write results to")
    parser.add_argument("--load", type=Path, nargs="+", default=[], help="files of results")
    arguments = parser.parse_args()
    tests: dict[str, tuple[SelfTest, float]] = {}
    for file in arguments.load:
        for name, (result, seconds) in json.loads(file.read_text()).items():
            tests[name] = SelfTest.model_validate(result), seconds
    with tempfile.TemporaryDirectory() as folder:
        tests |= {name: run(name, Path(folder)) for name in arguments.formats}
    if arguments.save is not None:
        arguments.save.write_text(json.dumps({name: (test.model_dump(), took) for name, (test, took) in tests.items()}))
    if arguments.output is not None:
        arguments.output.write_text(page(tests))


if __name__ == "__main__":
    main()
