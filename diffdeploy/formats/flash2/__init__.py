"""Eager FlashAttention-2: the format, its backend and its contract."""

from diffdeploy.formats.flash2.format import Flash2Format

__all__ = ["Flash2Format"]
