"""Shell completion of names from the registries, and of the layers of the given checkpoint, without torch."""

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

# Repeated here, since the table of layouts imports torch, which would delay the shell.
_LAYOUTS = (
    *("auto", "diffdeploy", "microsoft", "sdpadiff", "microsoft-v2", "diffllama", "motif", "axolotl", "phi4flash"),
    *("timm", "timm-dual", "diffclip", "blagpt", "blagpt-v2", "replay", "stable-audio"),
)
# model.layers.3.self_attn.q_proj.weight, blocks.3.attn.qkv.weight, transformer.h.3.attn.c_q.weight.
_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")
# Maximum size of a file's header in bytes, as in safetensors itself.
_LARGEST_HEADER = 100_000_000
_LENGTH_BYTES = 8


def _starting(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _of_list(names: Iterable[str], incomplete: str) -> list[str]:
    """Complete the name after the last comma."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in _starting(names, last)]


def complete_format(incomplete: str) -> list[str]:
    """Complete one format, or ``all``."""
    return _starting((*format_names(), "all"), incomplete)


def complete_formats(incomplete: str) -> list[str]:
    """Complete comma-separated formats."""
    return _of_list((*format_names(), "all", "none"), incomplete)


def complete_impls(incomplete: str) -> list[str]:
    """Complete comma-separated implementations."""
    from diffdeploy.ops.impl import Impl

    return _of_list((*Impl, "softmax", "softmax-compiled", "all", "none"), incomplete)


def complete_layout(incomplete: str) -> list[str]:
    """Complete one layout."""
    return _starting(_LAYOUTS, incomplete)


def complete_engine(incomplete: str) -> list[str]:
    """Complete one engine, or one of the other runtimes."""
    from diffdeploy.engines import engine_names

    return _starting((*engine_names(), "openvino", "reference"), incomplete)


def complete_layer(context: typer.Context, incomplete: str) -> list[str]:
    """Complete a layer of the checkpoint on the command line, or ``all``."""
    # The parser stops at --layer, which has no value yet; arguments that it has not assigned are in `context.args`.
    given = context.params.get("checkpoint") or next((word for word in context.args if not word.startswith("-")), None)
    sample = Path(diffdeploy.__file__).parent / "checkpoints" / "sample"
    layers = {int(found[1]) for key in _keys(Path(given or sample)) if (found := _LAYER.search(key))}
    return _starting([*map(str, sorted(layers)), "all"], incomplete)


def _keys(path: Path) -> list[str]:
    """Names of tensors, from the header of a file or its index; empty if they cannot be read."""
    import json

    try:
        if path.is_dir():
            indices, files = sorted(path.glob("*.index.json")), sorted(path.glob("*.safetensors"))
            path = [*indices, *files][0]
        if path.name.endswith(".index.json"):
            return list(json.loads(path.read_bytes())["weight_map"])
        with path.open("rb") as stream:
            # A file begins with the length of its header, a JSON object whose keys are names of tensors.
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            return list(json.loads(stream.read(min(length, _LARGEST_HEADER))))
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        # Without completions, the shell shows nothing, not even an error.
        return []
