"""The pages: every command on them is one that there is, and does what the page says when it is run there."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.exceptions import TyperException

from diffdeploy.checkpoints import read_model
from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.cli.main import app
from diffdeploy.compat import MultiheadFlashDiff1
from diffdeploy.exporters import ExportOptions
from diffdeploy.files import write_arrays
from tests.support.bundles import BundleCache
from tests.support.pages import (
    Block,
    blocks,
    commands,
    indented_commands,
    named_calls,
    pages,
    shown_calls,
    written_pages,
)
from tests.support.paths import ROOT

# Why a block is not run, in the words of the pages.
REASONS = {
    "network": "it asks a package index",
    "engine": "it needs an engine that has an environment of its own, where `make engines` runs the same command",
    "server": "it serves until it is interrupted; tests/engines starts it",
    "make": "it is a target of the Makefile, which installs and takes long",
    "shown": "it is the text of a file that is run",
    "long": "tests/cli/test_selftest_command.py runs the same command",
    "elsewhere": "docs/export.md has the same commands, and is run",
    "no template in the sample": "tests/runtime/test_chat.py renders those of other models",
}

# Run with every change; the others with `make slow`.
SHORT = ["docs/signatures.md"]
RUN = [
    str(page.relative_to(ROOT))
    for page in written_pages()
    if any(b.language in ("sh", "console", "python") for b in blocks(page))
]


def test_pages_have_commands() -> None:
    assert set(SHORT) < set(RUN)
    assert sum(len([*shown_calls(page), *named_calls(page)]) for page in pages()) > 80


def test_the_readme_is_a_page_long() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 900
    assert {"make demo", "make test"} <= {" ".join(words[:2]) for words in indented_commands(ROOT / "README.md")}


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_commands_and_options_exist(page: Path) -> None:
    """Parsed by the application itself, which does not run them: no option is unknown, no value of another type."""
    for words in shown_calls(page):
        # Some files are the reader's own.
        parse_up_to(words, "does not exist")
    for words in named_calls(page):
        parse_up_to(words, "^Missing|requires an argument")


def parse_up_to(words: list[str], accepted: str) -> None:
    """Parse a command, which may be refused for one reason."""
    try:
        parse(words)
    except TyperException as error:
        if not re.search(accepted, error.format_message()):
            raise


def parse(words: list[str]) -> None:
    group = typer.main.get_command(app)
    # Help ends the application when it is asked for.
    with suppress(typer.Exit), group.make_context("diffdeploy", list(words)) as context:
        name, command, rest = group.resolve_command(context, list(words))  # type: ignore[attr-defined]
        command.make_context(name, rest, parent=context)


def test_unknown_options_and_values_are_seen() -> None:
    for wrong in (["export", "--nope"], ["export", "--format", "tflite"], ["explode"], ["verify", "B", "--cases"]):
        with pytest.raises(TyperException):
            parse(wrong)


@pytest.mark.parametrize("page", written_pages(), ids=lambda page: page.name)
def test_what_is_not_run_says_why(page: Path) -> None:
    for block in blocks(page):
        assert block.not_run is None or block.not_run in REASONS, f"{page}:{block.line}"
        assert block.language, f"{page}:{block.line} has no language"
    # Commands in indented blocks would be run by nobody; the README's stand there for CI.
    indented = [words for words in indented_commands(page) if words[0] != "make"]
    assert not indented, f"{page}: put {indented} into a fenced block"


@pytest.mark.parametrize("page", SHORT)
def test_a_page(page: str, tmp_path: Path, bundles: BundleCache, sample_bundle: Path) -> None:
    run_page(ROOT / page, tmp_path, bundles, sample_bundle)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", [page for page in RUN if page not in SHORT])
def test_every_page(page: str, tmp_path: Path, bundles: BundleCache, sample_bundle: Path) -> None:
    run_page(ROOT / page, tmp_path, bundles, sample_bundle)


def run_page(page: Path, folder: Path, bundles: BundleCache, sample_bundle: Path) -> None:
    """Run the blocks of a page in order, in one folder that holds what pages call by fixed names."""
    prepared = folder / "page"
    prepared.mkdir()
    runs = [block for block in blocks(page) if block.not_run is None and block.language in RUNNERS]
    prepare(prepared, bundles, sample_bundle, "\n".join(block.code for block in runs))
    for block in runs:
        RUNNERS[block.language](block, prepared)


def prepare(folder: Path, bundles: BundleCache, sample_bundle: Path, text: str) -> None:
    """Files by the names that pages give them, but for those that the page makes: a checkpoint, bundles, inputs."""
    made = set(re.findall(r"(?:--output|-o) (\w+)", text))
    (folder / "examples").symlink_to(ROOT / "examples")
    shutil.copytree(SAMPLE, folder / "CHECKPOINT")
    torch.save(MultiheadFlashDiff1(embed_dim=64, depth=3, num_heads=2).state_dict(), folder / "block.pt")
    for name in {"block", "other"} - made:
        shutil.copytree(sample_bundle, folder / name)
    if "model" not in made and re.search(r"[\s\"]model[\s\"]", text):
        quick = ExportOptions(graph="model", max_batch_size=4, max_sequence_length=256, cases="quick")
        shutil.copytree(bundles.bundle(read_model(SAMPLE), quick), folder / "model")
    inputs = {"hidden_states": np.random.default_rng(0).normal(size=(1, 3, 128)).astype(np.float32)}
    write_arrays(folder / "x.safetensors", inputs)
    write_arrays(folder / "mine.npz", inputs)
    shutil.copy(shutil.__file__, folder / "my.txt")


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}


def _shell(line: str, folder: Path, where: str) -> str:
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{where}: {line}\n{done.stdout}{done.stderr}"
    return done.stdout


def _run_sh(block: Block, folder: Path) -> None:
    for line in commands(block):
        _shell(line, folder, f"line {block.line}")


def _run_console(block: Block, folder: Path) -> None:
    """What was printed must be what the page shows, but for numbers, and for what each ``...`` leaves out."""
    for part in re.split(r"^\$ ", block.code, flags=re.MULTILINE)[1:]:
        line, _, shown = part.partition("\n")
        said = _shell(line, folder, f"line {block.line}")
        pattern = ".*".join(re.escape(_without_numbers(piece)) for piece in shown.split("..."))
        assert re.search(pattern, _without_numbers(said), flags=re.DOTALL), f"line {block.line}: {line}\n{said}"


def _without_numbers(text: str) -> str:
    # Names of cases hold numbers too; which case is the worst one depends on the machine.
    return re.sub(r"\d+", "0", re.sub(r"worst \S+", "worst", text)).strip()


def _run_python(block: Block, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", block.code], cwd=folder, env=_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"line {block.line}\n{done.stderr}"


RUNNERS: dict[str, Callable[[Block, Path], None]] = {"sh": _run_sh, "console": _run_console, "python": _run_python}
