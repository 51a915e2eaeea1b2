"""The oldest version of onnxruntime that computes a graph correctly, from a table of measurements.

``scripts/measure_runtime_versions.py`` measures every released version again and compares this table with the results,
which are in ``docs/runtime-versions.md``.
"""

from typing import NamedTuple

from diffdeploy.bundle import Manifest
from diffdeploy.formats.onnx.names import FIRST_OPSET_WITH_ATTENTION, ORT, STANDARD
from diffdeploy.versions import release

__all__ = ["least_onnxruntime"]


class _Row(NamedTuple):
    """The oldest correct version for some graphs.

    Attributes:
        least: that version.
        opset: first operator set that the row applies to.
        flavor: flavor that the row applies to; ``None`` for both.
        masked: true if the row applies only to graphs with an attention mask.
        grouped: true if the row applies only to graphs with a block that has fewer key/value heads than heads.
        window: true if the row applies only to graphs with a block that has a sliding window.
        weights: bits of quantised matrices; if given, the row applies only to graphs with such matrices.
    """

    least: str
    opset: int = 0
    flavor: str | None = None
    masked: bool = False
    grouped: bool = False
    window: bool = False
    weights: str | None = None

    def holds(self, manifest: Manifest) -> bool:
        """True if the row applies to a graph."""
        blocks, options = manifest.config.blocks.values(), manifest.options
        how = options.quantisation
        return (
            # A manifest that no export wrote may have any value, including None.
            max(options.opset or 0, 0) >= self.opset
            and self.flavor in (None, options.flavor or STANDARD)
            and (not self.masked or "attention_mask" in manifest.graph.inputs)
            and (not self.grouped or any(block.num_heads != block.num_kv_heads for block in blocks))
            and (not self.window or any(block.sliding_window is not None for block in blocks))
            and (self.weights is None or (how is not None and how.weights == self.weights))
        )


# Measured on the CPU; nothing is known about CUDA kernels. No row depends on the dtype: float16 attentions are computed
# in float32 (`diffdeploy.exporters.onnx`), and graphs that are correct in float32 are within the budget of float16.
_TABLE = (
    # 1.16 and older reject the IR version 10 that torch writes; 1.17 and 1.18 cannot be imported with numpy 2.
    _Row("1.19.0"),
    # A version rejects operator sets that were released after it.
    _Row("1.21.0", opset=22),
    _Row("1.23.0", opset=23),
    _Row("1.24.1", opset=24),
    # In Attention of 1.23.0, heads read the wrong key/value heads: off by 440,000 budgets.
    _Row("1.23.1", opset=FIRST_OPSET_WITH_ATTENTION, flavor=STANDARD, grouped=True),
    # In older versions, GroupQueryAttention has no bias input, which masks need, so these versions reject the model.
    _Row("1.22.0", flavor=ORT, masked=True),
    # In GroupQueryAttention up to 1.23.2, a query sees one key too many for the window: off by 220,000 budgets.
    _Row("1.24.1", flavor=ORT, window=True),
    # MatMulNBits of older versions, 1.19.0 to 1.22.1, rejects 8 bits; 4 bits are correct in all, for every block size.
    _Row("1.23.0", weights="int8"),
)


def least_onnxruntime(manifest: Manifest) -> str:
    """Oldest version of onnxruntime that computes the graph of a bundle correctly.

    Args:
        manifest: manifest of the bundle.
    """
    return max((row.least for row in _TABLE if row.holds(manifest)), key=release)
