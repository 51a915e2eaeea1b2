"""The errors that users see. Each class has an exit code on the command line."""

__all__ = [
    "DiffDeployError",
    "ExportError",
    "InputError",
    "IntegrityError",
    "UnavailableError",
    "UnverifiedWarning",
    "VerificationError",
    "on_one_line",
]


def on_one_line(text: str) -> str:
    """Escape text, which may contain names from files, so that it stays on one line and cannot control a terminal."""
    line = " ".join(text.splitlines())
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)


class DiffDeployError(Exception):
    """Base of every error that diffdeploy raises on purpose.

    The message is one sentence that says what was given, what is accepted and what to do next. It is escaped to stay on
    one line and to send no control characters to a terminal, whatever names it quotes from files.
    """

    exit_code = 4

    # Escaped here, not in the constructor, since torch.compile also traces constructors of errors that are not raised.
    def __str__(self) -> str:
        return on_one_line(super().__str__())


class VerificationError(DiffDeployError):
    """The artifact does not compute what its weights and config define."""

    exit_code = 1


class InputError(DiffDeployError, ValueError):
    """An argument, a checkpoint or an input tensor is invalid."""

    # The command-line library uses the same exit code for an invalid option.
    exit_code = 2


class UnavailableError(DiffDeployError):
    """This machine lacks something that the request needs: a package, a device, disk space."""

    exit_code = 3


class ExportError(DiffDeployError):
    """A model could not be lowered to the requested format."""

    exit_code = 4


class IntegrityError(DiffDeployError):
    """A bundle does not match its manifest."""

    exit_code = 5


class UnverifiedWarning(UserWarning):
    """The loaded bundle has not passed a verification."""
