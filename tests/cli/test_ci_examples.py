"""The examples for CI: whether they parse, and whether the commands that they name do what they are there for."""

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml  # type: ignore[import-untyped]

from diffdeploy.checkpoints.files import SAMPLE
from diffdeploy.cli.main import app, main
from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("_in_an_empty_folder")

EXAMPLES = ROOT / "examples" / "ci"


def read(name: str) -> Any:
    return yaml.safe_load((EXAMPLES / name).read_text())


def workflow_commands() -> list[str]:
    (job,) = read("github-workflow.yml")["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    return [command for command in commands if command.startswith("diffdeploy ")]


def hook_commands() -> list[str]:
    (repository,) = read("pre-commit-config.yaml")["repos"]
    return [hook["entry"] for hook in repository["hooks"]]


@pytest.mark.parametrize("line", [*workflow_commands(), *hook_commands()])
def test_options_are_known(line: str) -> None:
    program, name, *arguments = shlex.split(line)
    assert program == "diffdeploy"
    command: Any = typer.main.get_command(app)
    command.commands[name].make_context(name, arguments)


def test_the_report_is_uploaded_whether_the_verification_passes_or_not() -> None:
    workflow = read("github-workflow.yml")
    # YAML 1.1 reads the key `on` as a truth value.
    assert set(workflow) == {"name", True, "jobs"}
    (job,) = workflow["jobs"].values()
    upload = next(step for step in job["steps"] if step.get("name") == "Upload the report")
    assert upload["if"] == "always()"
    written = [word for line in workflow_commands() for word in shlex.split(line) if word.startswith("verification.")]
    assert all(Path(name).match(upload["with"]["path"]) for name in written)
    assert written


@pytest.mark.slow
def test_commands_run(capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(SAMPLE, "checkpoint")
    for line in workflow_commands():
        assert main(shlex.split(line)[1:]) == 0, line
    # Stored outputs are compared in a bundle that was verified when it was made.
    assert main(["export", "checkpoint", "--output", "bundle", "--cases", "quick", "--force"]) == 0
    for line in hook_commands():
        assert main(shlex.split(line)[1:]) == 0, line
    assert {path.name for path in Path.cwd().iterdir()} == {
        "bundle",
        "checkpoint",
        "verification.html",
        "verification.xml",
    }
