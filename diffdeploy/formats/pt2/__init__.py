"""Exported programs: the format, how it is opened, its contract, and what of it can be seen and changed."""

from diffdeploy.formats.pt2.format import Pt2Format

__all__ = ["Pt2Format"]
