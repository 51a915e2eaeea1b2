"""What a shell completes: names from the registries, and the layers of the checkpoint on the line; none needs torch."""

import re
from collections.abc import Iterable
from pathlib import Path

import typer

import diffdeploy
from diffdeploy.formats import format_names

__all__ = [
    "complete_engine",
    "complete_format",
    "complete_formats",
    "complete_impls",
    "complete_layer",
    "complete_layout",
]

# The table of layouts comes with torch, for which a shell would wait.
_LAYOUTS = (
    *("auto", "diffdeploy", "microsoft", "sdpadiff", "microsoft-v2", "diffllama", "motif", "axolotl", "phi4flash"),
    *("timm", "timm-dual", "diffclip", "blagpt", "blagpt-v2", "replay", "stable-audio"),
)
# model.layers.3.self_attn.q_proj.weight, blocks.3.attn.qkv.weight, transformer.h.3.attn.c_q.weight.
_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")
# Of a file's header; what safetensors itself accepts.
_LARGEST_HEADER = 100_000_000
_LENGTH_BYTES = 8


def _starting(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _of_list(names: Iterable[str], incomplete: str) -> list[str]:
    """Names behind the last comma."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in _starting(names, last)]


def complete_format(incomplete: str) -> list[str]:
    """One format, or all."""
    return _starting((*format_names(), "all"), incomplete)


def complete_formats(incomplete: str) -> list[str]:
    """Formats with commas."""
    return _of_list((*format_names(), "all", "none"), incomplete)


def complete_impls(incomplete: str) -> list[str]:
    """Implementations with commas."""
    from diffdeploy.ops.impl import Impl

    return _of_list((*Impl, "softmax", "all", "none"), incomplete)


def complete_layout(incomplete: str) -> list[str]:
    """One layout."""
    return _starting(_LAYOUTS, incomplete)


def complete_engine(incomplete: str) -> list[str]:
    """One engine, or one of the other runtimes."""
    from diffdeploy.engines import engine_names

    return _starting((*engine_names(), "openvino", "reference"), incomplete)


def complete_layer(context: typer.Context, incomplete: str) -> list[str]:
    """The layers of the checkpoint that is on the line, or all."""
    # The parser stops at the option that lacks its value, and leaves what it has not given a name to.
    given = context.params.get("checkpoint") or next((word for word in context.args if not word.startswith("-")), None)
    sample = Path(diffdeploy.__file__).parent / "checkpoints" / "sample"
    layers = {int(found[1]) for key in _keys(Path(given or sample)) if (found := _LAYER.search(key))}
    return _starting([*map(str, sorted(layers)), "all"], incomplete)


def _keys(path: Path) -> list[str]:
    """Names of tensors, from the head of a file or its index; none where that cannot be had at once."""
    import json

    try:
        if path.is_dir():
            indices, files = sorted(path.glob("*.index.json")), sorted(path.glob("*.safetensors"))
            path = [*indices, *files][0]
        if path.name.endswith(".index.json"):
            return list(json.loads(path.read_bytes())["weight_map"])
        with path.open("rb") as stream:
            # The format begins with the length of its header, a JSON object by the names of tensors.
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            return list(json.loads(stream.read(min(length, _LARGEST_HEADER))))
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        # A shell shows nothing where there is nothing to complete.
        return []
