"""Inputs in files: those that a user provides for a verification, and those of the cases that ran."""

from collections.abc import Sequence
from pathlib import Path

from diffdeploy.arrays import Array
from diffdeploy.errors import InputError
from diffdeploy.files import check_target, read_arrays, write_arrays
from diffdeploy.graphs import GraphSpec
from diffdeploy.runtime import check_inputs
from diffdeploy.verify.cases import AnyCase, UserCase

__all__ = ["read_inputs", "write_inputs"]


def read_inputs(path: Path, spec: GraphSpec) -> list[UserCase]:
    """Read the cases in a file: one with arrays named like the graph's inputs, or several as ``CASE.NAME``.

    Args:
        path: a ``.safetensors`` or ``.npz`` file.
        spec: interface of the graph.

    Raises:
        InputError: the file cannot be read, or a name, dtype, shape or value is not what the graph accepts.
    """
    arrays = read_arrays(path)
    cases: dict[str, dict[str, Array]] = {}
    for key, array in arrays.items():
        # Split from the right, since names of inputs contain dots and names of cases may contain them.
        name = next((name for name in spec.inputs if key == name or key.endswith(f".{name}")), None)
        if name is None:
            raise InputError(
                f"{path} holds {key}; accepted: the inputs of the graph, {', '.join(spec.inputs)}, "
                "or CASE.NAME for several cases"
            )
        cases.setdefault(key.removesuffix(name).removesuffix("."), {})[name] = array
    if not cases:
        raise InputError(f"{path} holds no array; accepted: {', '.join(spec.inputs)}")
    for case, inputs in cases.items():
        try:
            check_inputs(spec, inputs)
        except InputError as error:
            raise InputError(f"{path}{f', case {case}' if case else ''}: {error}") from error
    return [UserCase(name=name or _sizes(inputs), arrays=inputs) for name, inputs in cases.items()]


def _sizes(inputs: dict[str, Array]) -> str:
    batch, length, past = UserCase(name="", arrays=inputs).sizes
    return "-".join([f"B{batch}", *([f"P{past}"] if past else []), f"S{length}"])


def write_inputs(path: Path, cases: Sequence[AnyCase], spec: GraphSpec) -> None:
    """Write the inputs of cases as ``CASE.NAME``, for `read_inputs` or other programs.

    Args:
        path: ``.safetensors`` or ``.npz`` file, which is replaced if it exists.
        cases: cases to write.
        spec: interface of the graph.

    Raises:
        InputError: the file cannot be written there, or cannot store the dtype.
        UnavailableError: the file cannot be written.
    """
    # Checked before the inputs of all cases are created, which takes a while.
    check_target(path, force=True)
    write_arrays(path, {f"{case.id}.{name}": array for case in cases for name, array in case.inputs(spec).items()})
