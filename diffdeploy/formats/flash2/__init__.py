"""Eager FlashAttention-2: the format, how it is opened, its contract, and what of it can be seen and changed."""

from diffdeploy.formats.flash2.format import Flash2Format

__all__ = ["Flash2Format"]
