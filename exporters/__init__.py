"""Exporters: the steps of an export and of a conversion, and a module for each format that needs lowering."""

from diffdeploy.exporters.convert import Conversion, convert_model
from diffdeploy.exporters.export import Export, export_bundle, lower_block, settled_length
from diffdeploy.formats import ExportOptions

__all__ = [
    "Conversion",
    "Export",
    "ExportOptions",
    "convert_model",
    "export_bundle",
    "lower_block",
    "settled_length",
]
