"""The names of the implementations."""

from enum import StrEnum

__all__ = ["Impl"]


class Impl(StrEnum):
    """Name of an implementation, which is one way to compute the two attentions of a differential head."""

    AUTO = "auto"
    NAIVE = "naive"
    CHUNKED = "chunked"
    TWO_CALL = "two_call"
    PADDED = "padded"
    FOUR_CALL = "four_call"
    STACKED_SPLIT = "stacked_split"
    STACKED_WIDE = "stacked_wide"
    FLASH2 = "flash2"
    PAIRED = "paired"
    ROWS = "rows"
    FUSED = "fused"
