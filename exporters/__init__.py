"""Exporters: the life of an export, the same for every format, and one module per format that lowers."""

from diffdeploy.exporters.export import Export, export_bundle, lower_block, settled_length
from diffdeploy.formats import ExportOptions

__all__ = ["Export", "ExportOptions", "export_bundle", "lower_block", "settled_length"]
