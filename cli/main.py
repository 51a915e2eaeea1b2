"""The typer application, and the one place where errors become a sentence and an exit code."""

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Annotated

import typer
from typer.exceptions import TyperException

from diffdeploy import __version__
from diffdeploy.cli import console
from diffdeploy.cli.bench import bench
from diffdeploy.cli.convert import convert
from diffdeploy.cli.deploy import deploy
from diffdeploy.cli.diff import diff
from diffdeploy.cli.env import env
from diffdeploy.cli.export import export
from diffdeploy.cli.generate import generate
from diffdeploy.cli.inspect import inspect
from diffdeploy.cli.interrupts import ended_by_interrupts
from diffdeploy.cli.panels import in_panels
from diffdeploy.cli.run import run as run_bundle
from diffdeploy.cli.serve import serve
from diffdeploy.cli.sign import sign
from diffdeploy.cli.verify import verify
from diffdeploy.errors import DiffDeployError, InputError, UnavailableError

__all__ = ["app", "main", "run"]

# Optional packages, and the extra that installs each.
_EXTRAS = {"torch": "export", "onnx": "export", "onnxscript": "export", "onnxruntime": "cpu", "matplotlib": "plot"}

app = typer.Typer(
    help="Package trained differential attention for deployment, and prove that the package is correct.",
    no_args_is_help=True,
    add_completion=True,
    # `main` prints an error as one sentence, and --debug shows Python's own traceback.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 passed, 1 verification failed, 2 bad input, 3 missing package, device or disk space, "
    "4 export failed, 5 damaged bundle.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print_text(f"diffdeploy {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    pass


for command in (export, convert, generate, verify, diff, run_bundle, inspect, sign, serve, deploy, bench, env):
    # Commands also run without arguments: export uses the sample, and bench uses a random block.
    app.command(command.__name__, no_args_is_help=False)(ended_by_interrupts(in_panels(command)))


# Raises what Ctrl-C raises, so that SIGTERM also cleans up temporary folders and processes.
def _terminated(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def run() -> None:
    """Entry point of the installed command: run it and exit with its code."""
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: arguments without the program's name; by default those of this process.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Accepted anywhere on the line, since users append it to a command that has just failed.
    debug = "--debug" in given
    return _run([argument for argument in given if argument != "--debug"], debug=debug)


def _run(arguments: list[str], *, debug: bool) -> int:
    try:
        # Not standalone: typer would print errors in boxes and exit with codes of its own.
        code = app(arguments, standalone_mode=False, prog_name="diffdeploy")
    except BrokenPipeError:
        # Python flushes its output at exit, and would fail again on the closed pipe (docs of `signal`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return console.INTERRUPTED
    except (Exception, KeyboardInterrupt) as error:
        end = _wanted_end(error) or (None if debug else _failure(error))
        if end is None:
            raise
        return _finish(end, as_json="--json" in arguments)
    # Help and --version return no exit code.
    return code if isinstance(code, int) else 0


def _wanted_end(error: BaseException) -> console.Ended | None:
    """Exit code and message for an error whose traceback would not help, even with --debug; ``None`` for others."""
    if isinstance(error, console.Ended):
        return error
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return console.Ended(console.INTERRUPTED, "interrupted")
    if isinstance(error, TyperException):
        if not error.format_message():  # help was shown, since no command was given
            return console.Ended(error.exit_code)
        # typer checks options with pydantic, which puts these words before the message of a callback.
        message = error.format_message().rstrip(".").replace("Value error, ", "")
        return console.Ended(InputError.exit_code, f"{message}; see diffdeploy --help")
    if isinstance(error, MemoryError):
        return console.Ended(UnavailableError.exit_code, "not enough memory; use a smaller --max-sequence-length")
    return None


def _failure(error: BaseException) -> console.Ended | None:
    """Sentence that replaces a traceback; ``None`` if only a traceback helps."""
    if isinstance(error, DiffDeployError):
        return console.Ended(error.exit_code, str(error))
    if isinstance(error, ModuleNotFoundError):
        # Any other module belongs to diffdeploy or its dependencies, so the installation is broken.
        if error.name not in _EXTRAS:
            return None
        message = f"{error.name} is not installed; pip install 'diffdeploy[{_EXTRAS[error.name]}]'"
        return console.Ended(UnavailableError.exit_code, message)
    kind = type(error).__name__
    return console.Ended(DiffDeployError.exit_code, f"unexpected {kind}: {error}; --debug shows where")


def _finish(end: console.Ended, *, as_json: bool) -> int:
    if end.message is not None:
        if as_json:
            console.print_json({"status": "failed", "error": end.message, "exit_code": end.code})
        console.fail(end.message)
    return end.code
