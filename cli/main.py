"""The typer application, and the one place where errors become a sentence and an exit code."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from types import FrameType
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from diffdeploy import __version__
from diffdeploy.cli import console
from diffdeploy.cli.bench import bench
from diffdeploy.cli.diff import diff
from diffdeploy.cli.env import env
from diffdeploy.cli.export import export
from diffdeploy.cli.inspect import inspect
from diffdeploy.cli.run import run as run_bundle
from diffdeploy.cli.verify import verify
from diffdeploy.errors import DiffDeployError, InputError, UnavailableError

__all__ = ["app", "main", "run"]

# Packages that not every installation has, and the extra that brings each.
_EXTRAS = {"torch": "export", "onnx": "export", "onnxscript": "export", "onnxruntime": "cpu", "matplotlib": "plot"}

app = typer.Typer(
    help="Package trained differential attention for deployment, and prove that the package is right.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 passed, 1 verification failed, 2 bad input, 3 this machine lacks something, "
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


def _ended_by_interrupts(command: Callable[..., int]) -> Callable[..., int]:
    """The command, whose interrupt ends it with one sentence; typer would turn it into an exit code without a word."""

    @wraps(command)
    def run_command(*arguments: Any, **options: Any) -> int:
        try:
            return command(*arguments, **options)
        except KeyboardInterrupt as interrupt:
            raise console.Ended(console.INTERRUPTED, "interrupted; nothing was kept") from interrupt

    return run_command


for command in (export, verify, diff, run_bundle, inspect, bench, env):
    app.command(command.__name__, no_args_is_help=False)(_ended_by_interrupts(command))


def _terminated(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def run() -> None:
    """Entry point of the installed command: run it and exit with its code."""
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; by default those of this process.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Accepted anywhere on the line, since one adds it to a command that has just failed.
    debug = "--debug" in given
    return _run([argument for argument in given if argument != "--debug"], debug=debug)


def _run(arguments: list[str], *, debug: bool) -> int:
    as_json = "--json" in arguments
    try:
        code = app(arguments, standalone_mode=False, prog_name="diffdeploy")
    except console.Ended as end:
        return end.code if end.message is None else _report(end.message, end.code, as_json)
    except (KeyboardInterrupt, typer.Abort):
        return _report("interrupted; nothing was kept", console.INTERRUPTED, as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return console.INTERRUPTED
    except TyperException as error:
        if not error.format_message():  # the help was asked for by giving nothing
            return error.exit_code
        message = error.format_message().rstrip(".").replace("Value error, ", "")
        return _report(f"{message}; see diffdeploy --help", InputError.exit_code, as_json)
    except MemoryError:
        return _report("not enough memory; use a smaller --max-sequence-length", UnavailableError.exit_code, as_json)
    except DiffDeployError as error:
        if debug:
            raise
        return _report(str(error), error.exit_code, as_json)
    except ModuleNotFoundError as error:
        if debug or error.name not in _EXTRAS:
            raise
        message = f"{error.name} is not installed; pip install 'diffdeploy[{_EXTRAS[error.name]}]'"
        return _report(message, UnavailableError.exit_code, as_json)
    except Exception as error:
        if debug:
            raise
        kind = type(error).__name__
        return _report(f"unexpected {kind}: {error}; --debug shows where", DiffDeployError.exit_code, as_json)
    return code if isinstance(code, int) else 0


def _report(message: str, code: int, as_json: bool) -> int:
    if as_json:
        console.print_json({"status": "failed", "error": message, "exit_code": code})
    console.fail(message)
    return code
