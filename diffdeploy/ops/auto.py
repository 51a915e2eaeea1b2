"""What each deployment format ships for each variant of the graph: implementations for graphs that serve all sizes."""

from diffdeploy.ops.impl import Impl

__all__ = ["shipped_impl"]

# Those with two attentions promise two operators. The cached graphs of formats with machine code read their cache once.
_SHIPPED: dict[str, dict[str, Impl]] = {
    "onnx": {"plain": Impl.TWO_CALL, "masked": Impl.TWO_CALL, "cached": Impl.PADDED},
    "pt2": {"plain": Impl.PADDED, "masked": Impl.PADDED, "cached": Impl.PADDED},
    "aoti": {"plain": Impl.PADDED, "masked": Impl.PADDED, "cached": Impl.ROWS},
    "compile": {"plain": Impl.PADDED, "masked": Impl.PADDED, "cached": Impl.ROWS},
    "flash2": {"plain": Impl.FLASH2},
}


def shipped_impl(format_name: str, graph: str) -> Impl:
    """What a format ships when ``auto`` is asked for.

    Args:
        format_name: a deployment format; of one that is not known, ``auto``.
        graph: variant of the graph.
    """
    return _SHIPPED.get(format_name, {}).get(graph, Impl.AUTO)
