"""The errors users meet. Each class is one exit code of the command line."""

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
    """The text in one line that changes nothing on a terminal, whatever names out of files it holds."""
    line = " ".join(text.splitlines())
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)


class DiffDeployError(Exception):
    """Base of every error that diffdeploy raises on purpose.

    The message is one sentence: what was given, what is accepted, what to do next. It stays on one line, and changes
    nothing on a terminal, whatever name out of a file it holds.
    """

    exit_code = 4

    # Not when it is made, since torch.compile traces how errors are made that are never raised.
    def __str__(self) -> str:
        return on_one_line(super().__str__())


class VerificationError(DiffDeployError):
    """The artifact does not compute what its weights and config say."""

    exit_code = 1


class InputError(DiffDeployError, ValueError):
    """An argument, a checkpoint or an input tensor is not acceptable."""

    # What the command-line library exits with for a wrong option, too.
    exit_code = 2


class UnavailableError(DiffDeployError):
    """This machine lacks something that was asked for: a package, a device, disk space."""

    exit_code = 3


class ExportError(DiffDeployError):
    """A model could not be lowered to the requested format."""

    exit_code = 4


class IntegrityError(DiffDeployError):
    """A bundle is not what its manifest says."""

    exit_code = 5


class UnverifiedWarning(UserWarning):
    """A bundle is loaded that no verification has accepted."""
