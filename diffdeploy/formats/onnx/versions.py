"""The least onnxruntime that computes a graph rightly, by what is in the graph: one table, from measurements.

``scripts/measure_runtime_versions.py`` measures every released version again and holds this table against the results;
``docs/runtime-versions.md`` has them.
"""

from typing import NamedTuple

from diffdeploy.bundle import Manifest
from diffdeploy.formats.onnx.names import FIRST_OPSET_WITH_ATTENTION, ORT, STANDARD
from diffdeploy.versions import release

__all__ = ["least_onnxruntime"]


class _Row(NamedTuple):
    """The least version for some graphs.

    Attributes:
        least: version.
        opset: of graphs of this operator set and later ones.
        flavor: of graphs of this flavor; ``None`` for both.
        masked: only of graphs with an attention mask.
        grouped: only of graphs in which a block has fewer key/value heads than heads.
        window: only of graphs in which a block has a sliding window.
        weights: only of graphs with matrices that are quantised to such numbers.
    """

    least: str
    opset: int = 0
    flavor: str | None = None
    masked: bool = False
    grouped: bool = False
    window: bool = False
    weights: str | None = None

    def holds(self, manifest: Manifest) -> bool:
        """Whether it says something of a graph."""
        blocks, options = manifest.config.blocks.values(), manifest.options
        how = options.quantisation
        return (
            # None, or whatever a manifest says that no export wrote.
            max(options.opset or 0, 0) >= self.opset
            and self.flavor in (None, options.flavor or STANDARD)
            and (not self.masked or "attention_mask" in manifest.graph.inputs)
            and (not self.grouped or any(block.num_heads != block.num_kv_heads for block in blocks))
            and (not self.window or any(block.sliding_window is not None for block in blocks))
            and (self.weights is None or (how is not None and how.weights == self.weights))
        )


# Measured on the CPU; nothing is known of CUDA kernels alone. No row is of a dtype: attentions of float16 are computed
# in float32 (`diffdeploy.exporters.onnx`), and whatever is right in float32 is within the budget of float16, too.
_TABLE = (
    # 1.16 and older refuse the IR version 10 that torch writes; 1.17 and 1.18 cannot be imported beside numpy 2.
    _Row("1.19.0"),
    # Older ones refuse an operator set that is newer than they are.
    _Row("1.21.0", opset=22),
    _Row("1.23.0", opset=23),
    _Row("1.24.1", opset=24),
    # In Attention of 1.23.0 heads read other key/value heads than theirs: off by 440,000 budgets.
    _Row("1.23.1", opset=FIRST_OPSET_WITH_ATTENTION, flavor=STANDARD, grouped=True),
    # GroupQueryAttention of older ones takes no bias, which a mask is, and they refuse the model.
    _Row("1.22.0", flavor=ORT, masked=True),
    # In GroupQueryAttention up to 1.23.2 a query sees one key more than the window has: off by 220,000 budgets.
    _Row("1.24.1", flavor=ORT, window=True),
    # MatMulNBits of older ones, 1.19.0 to 1.22.1, refuses 8 bits; with 4 all are right, in blocks of every size.
    _Row("1.23.0", weights="int8"),
)


def least_onnxruntime(manifest: Manifest) -> str:
    """The least version that computes the graph of a bundle rightly.

    Args:
        manifest: of the bundle.
    """
    return max((row.least for row in _TABLE if row.holds(manifest)), key=release)
