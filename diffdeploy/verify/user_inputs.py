"""Inputs in files: those that a user brings to be verified on, and those of the cases that ran."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffdeploy.arrays import Array, read_safetensors
from diffdeploy.errors import InputError, IntegrityError
from diffdeploy.graphs import GraphSpec
from diffdeploy.runtime import check_inputs
from diffdeploy.verify.cases import AnyCase, UserCase

__all__ = ["read_inputs", "write_inputs"]

_SUFFIXES = (".safetensors", ".npz")


def read_inputs(path: Path, spec: GraphSpec) -> list[UserCase]:
    """The cases in a file: one, whose arrays have the names of the graph's inputs; or several, as ``CASE.NAME``.

    Args:
        path: a ``.safetensors`` or ``.npz`` file.
        spec: interface of the graph.

    Raises:
        InputError: the file cannot be read, or a name, dtype, shape or value is not what the graph accepts.
    """
    arrays = _read(path)
    cases: dict[str, dict[str, Array]] = {}
    for key, array in arrays.items():
        name = next((name for name in spec.inputs if key == name or key.endswith(f".{name}")), None)
        if name is None:
            raise InputError(
                f"{path} holds {key}; accepted are the inputs of the graph, {', '.join(spec.inputs)}, "
                "or CASE.NAME for several cases"
            )
        cases.setdefault(key.removesuffix(name).removesuffix("."), {})[name] = array
    if not cases:
        raise InputError(f"{path} holds no array; accepted are {', '.join(spec.inputs)}")
    for case, inputs in cases.items():
        try:
            check_inputs(spec, inputs)
        except InputError as error:
            raise InputError(f"{path}{f', case {case}' if case else ''}: {error}") from error
    return [UserCase(name=name or _sizes(inputs), arrays=inputs) for name, inputs in cases.items()]


def _sizes(inputs: dict[str, Array]) -> str:
    batch, length, _ = inputs["hidden_states"].shape
    past = inputs["past_key_values.key"].shape[2] if "past_key_values.key" in inputs else 0
    return "-".join([f"B{batch}", *([f"P{past}"] if past else []), f"S{length}"])


def _read(path: Path) -> dict[str, Array]:
    _check_suffix(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a file with the inputs of the graph")
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (IntegrityError, ValueError, OSError, zipfile.BadZipFile, AttributeError) as error:
        raise InputError(f"{path} cannot be read as {path.suffix}: {error}") from error


def _check_suffix(path: Path) -> None:
    if path.suffix not in _SUFFIXES:
        raise InputError(f"{path} ends in {path.suffix or 'nothing'}; accepted is {' or '.join(_SUFFIXES)}")


def write_inputs(path: Path, cases: Sequence[AnyCase], spec: GraphSpec) -> None:
    """Write the inputs of cases as ``CASE.NAME``, to be read by `read_inputs` or by anything else.

    Args:
        path: ``.safetensors`` or ``.npz``, which does not know bfloat16; replaced if it exists.
        cases: what to write.
        spec: interface of the graph.

    Raises:
        InputError: the file cannot be written, or cannot hold the dtype.
    """
    import safetensors.numpy

    _check_suffix(path)
    if path.suffix == ".npz" and spec.dtype == "bfloat16":
        raise InputError(f"{path} cannot hold bfloat16, which .npz does not have; give a .safetensors file")
    arrays = {f"{case.id}.{name}": array for case in cases for name, array in case.inputs(spec).items()}
    try:
        if path.suffix == ".safetensors":
            path.write_bytes(safetensors.numpy.save(arrays))
        else:
            np.savez(path, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the names for its own options
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); give another file") from error
