"""Sanitised ``.pt2`` archives for torch, without anything that could run code when they are loaded.

`torch.export.load` unpickles sample inputs, weights and constants, evaluates expressions, looks up operators by names
in the file, and executes source that it writes from the rest. An exported program needs none of that freedom: its
weights are bytes, its operators only compute, and its expressions are arithmetic. This module therefore reads an
archive first and passes on a new archive of the checked content, without sample inputs, which are not needed.

Source: torch 2.11 to 2.14, ``torch/export/pt2_archive`` and ``torch/_export/serde``.
"""

import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffdeploy.errors import IntegrityError
from diffdeploy.formats.pt2.expressions import is_expression, is_guard, is_name

__all__ = ["checked_archive"]

_SAMPLE_INPUTS = re.compile(r"data/sample_inputs/\w+\.pt")
_GRAPH = re.compile(r"models/\w+\.json")
_PAYLOADS = re.compile(r"data/(weights|constants)/model_\1_config\.json|data/(weights|constants)/\w+_config\.json")
# Tensors stored as bytes, and the archive's own format fields.
_PLAIN = re.compile(r"data/(weights/weight|constants/tensor)_\d+|archive_format|archive_version|byteorder|version|"
                    r"\.data/(version|serialization_id)|\.format_version|\.storage_alignment")  # fmt: skip

# All operators that an exported block can call. Each only computes a tensor or a size from tensors and sizes, or writes
# into a tensor within its bounds, as `index_copy_` does for a cache. The last line has operators that only faults of
# the self-test call: they are accepted here, since verification must find wrong computations by their results.
_ATEN = frozenset(
    {
        *("__and__", "__or__", "_assert_scalar", "_assert_tensor_metadata", "_softmax", "_to_copy", "add", "addcmul"),
        *("alias", "all", "and", "any", "arange", "bitwise_and", "bitwise_not", "bitwise_or", "cat", "chunk"),
        *("clone", "contiguous", "copy", "cumsum", "detach", "detach_", "div", "embedding", "eq", "exp", "expand"),
        *("expand_as", "flatten", "floor_divide", "full", "full_like", "ge", "gelu", "gt", "index", "index_copy_"),
        *("eye", "index_select"),
        *("le", "lift_fresh_copy", "linear", "logical_and", "logical_not", "logical_or", "lt", "masked_fill"),
        *("matmul", "max", "maximum", "mean", "min", "minimum", "mul", "narrow", "ne", "neg", "new_zeros"),
        *("ones", "ones_like", "pad", "constant_pad_nd", "permute", "pow", "reciprocal", "repeat"),
        *("repeat_interleave", "reshape", "rms_norm", "rsqrt", "rsub", "scalar_tensor"),
        *("scaled_dot_product_attention", "select", "sigmoid", "silu"),
        *("slice", "softmax", "split", "split_with_sizes", "sqrt", "squeeze", "stack", "sub", "sum"),
        *("sym_constrain_range", "sym_constrain_range_for_size", "sym_numel", "sym_size", "sym_stride", "t", "to"),
        *("transpose", "tril", "triu", "unbind", "unflatten", "unsqueeze", "view", "where", "zeros", "zeros_like"),
        *("clamp", "flip", "roll", "square"),
    }
)
_OPERATOR = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)")
_OF_SIZES = re.compile(
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)|"
    r"torch\.(sym_(max|min|not|ite|int|float)|sym_sum)|math\.(ceil|floor|trunc)"
)
_VERSION = re.compile(r"[0-9A-Za-z.+_-]*")
# Submodules and objects of custom classes, which no export of a block has.
_NEVER = ("as_graph", "as_custom_obj", "as_operator", "class_fqn", "custom_obj", "custom_obj_name")
# Numbers that torch writes as strings, since JSON lacks them.
_NOT_IN_JSON = ("Infinity", "-Infinity", "NaN")
_TREES = ("in_spec", "out_spec")
_CONTAINERS = ("builtins.tuple", "builtins.list", "builtins.dict")


def checked_archive(path: Path) -> io.BytesIO:
    """Sanitise an archive for torch.

    Args:
        path: path of the archive.

    Raises:
        IntegrityError: the archive contains something that could run code, or is not such an archive.
    """
    clean = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(clean, "w") as kept:
            names = archive.namelist()
            if len(set(names)) != len(names):
                raise _refused(path, "it has two entries with the same name")
            if len({name.partition("/")[0] for name in names}) > 1:
                raise _refused(path, "it has two folders, and readers may choose different ones")
            for entry in archive.infolist():
                # torch stores entries uncompressed; a compressed entry could expand until it fills the memory.
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise _refused(path, f"{entry.filename} is compressed")
                kept.writestr(entry.filename, _content(path, entry.filename, archive.read(entry)))
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, UnicodeError, RuntimeError) as error:
        raise IntegrityError(f"{path} is not an archive of torch.export ({error}); export it again") from error
    clean.seek(0)
    return clean


def _refused(path: Path, reason: str) -> IntegrityError:
    return IntegrityError(f"{path} is not loaded, since that could run code: {reason}; no export makes such a file")


def _content(path: Path, name: str, content: bytes) -> bytes:
    """Sanitised content of one entry."""
    # All entries are in one folder, named after the file when it was written.
    below = name.partition("/")[2]
    if _SAMPLE_INPUTS.fullmatch(below):
        return b""
    if _GRAPH.fullmatch(below):
        _require_graph(path, _json(path, name, content))
    elif _PAYLOADS.fullmatch(below):
        _require_no_pickles(path, name, _json(path, name, content))
    elif not _PLAIN.fullmatch(below):
        raise _refused(path, f"it holds {name}")
    return content


def _json(path: Path, name: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{name} in {path} is not readable JSON; export it again") from error


def _require_no_pickles(path: Path, name: str, payloads: Any) -> None:
    config = payloads.get("config") if isinstance(payloads, dict) else None
    if not isinstance(config, dict):
        raise _refused(path, f"{name} does not say how its tensors are stored")
    for tensor, payload in config.items():
        if not isinstance(payload, dict) or payload.get("use_pickle") is not False:
            raise _refused(path, f"{tensor} in {name} is a pickle")
        # The name must be plain: with folders in it, torch would read from another place.
        if not re.fullmatch(r"(weight|tensor)_\d+", str(payload.get("path_name"))):
            raise _refused(path, f"{tensor} in {name} refers to {payload.get('path_name')!r}")
        _Walk(path).value("", {key: each for key, each in payload.items() if key != "path_name"})


def _require_graph(path: Path, model: Any) -> None:
    if not isinstance(model, dict):
        raise _refused(path, "its graph is not a JSON object")
    walk = _Walk(path)
    for key, value in model.items():
        if key == "guards_code":
            walk.texts(key, value, is_guard)
        elif key == "range_constraints":
            walk.texts(key, list(value) if isinstance(value, dict) else value, is_expression)
            walk.value(key, list(value.values()))
        else:
            walk.value(key, value)


class _Walk:
    """Check of every string in a graph, which must be an expression, an operator or a name, according to its place."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def value(self, key: str, value: Any) -> None:
        """Check the value of a key."""
        if key in _NEVER or (key == "custom_obj_values" and value):
            raise _refused(self._path, f"its graph has {key}")
        if isinstance(value, dict):
            for name, each in value.items():
                if not is_name(name):
                    raise _refused(self._path, f"its graph has a key {name[:80]!r}")
                self._field(name, each)
        elif isinstance(value, list):
            for each in value:
                self.value(key, each)
        elif isinstance(value, str):
            self._text(key, value)

    def _field(self, name: str, value: Any) -> None:
        if name == "metadata":
            self.texts(name, list(value.values()) if isinstance(value, dict) else value, _is_line)
        elif name in _TREES and isinstance(value, str):
            self._tree(name, _json(self._path, name, value.encode()))
        else:
            self.value(name, value)

    def texts(self, key: str, texts: Any, fits: Callable[[object], bool]) -> None:
        """Check a list of strings of one kind."""
        if not isinstance(texts, list):
            raise _refused(self._path, f"its {key} is {type(texts).__name__}")
        for text in texts:
            if not fits(text):
                raise _refused(self._path, f"its {key} has {str(text)[:80]!r}")

    def _text(self, key: str, text: str) -> None:
        if key == "expr_str":
            fits = is_expression(text)
        elif key == "target":
            match = _OPERATOR.fullmatch(text)
            fits = _is_overload(*match.groups()) if match else _OF_SIZES.fullmatch(text) is not None
        elif key == "as_float":
            fits = text in _NOT_IN_JSON
        elif key == "torch_version":
            fits = _VERSION.fullmatch(text) is not None
        else:
            fits = text == "" or is_name(text)
        if not fits:
            raise _refused(self._path, f"its graph has {key} {text[:80]!r}")

    def _tree(self, name: str, tree: Any) -> None:
        """Check the nesting of inputs and outputs, which must use Python's own containers, by name."""
        if isinstance(tree, dict):
            kind = tree.get("type")
            if kind is not None and kind not in _CONTAINERS:
                raise _refused(self._path, f"its {name} has {str(kind)[:80]!r}")
            for each in tree.values():
                self._tree(name, each)
        elif isinstance(tree, list):
            for each in tree:
                self._tree(name, each)
        elif isinstance(tree, str) and tree not in (*_CONTAINERS, "null", "[]", "") and not is_name(tree):
            raise _refused(self._path, f"its {name} has {tree[:80]!r}")


def _is_overload(name: str, overload: str) -> bool:
    """True if the name is that of an operator, and not of another attribute that torch would find."""
    import torch

    return name in _ATEN and overload in getattr(torch.ops.aten, name).overloads()


def _is_line(text: object) -> bool:
    return isinstance(text, str) and len(text.splitlines()) <= 1
