"""Exported programs: the format, its backend, its contract, its constants, intermediate values and faults."""

from diffdeploy.formats.pt2.format import Pt2Format

__all__ = ["Pt2Format"]
