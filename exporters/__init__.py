"""Exporters: one module per deployment format, and the life of an export that is the same for all of them."""

from diffdeploy.exporters.base import FORMATS, Export, ExportOptions, export_bundle, why_not_export

__all__ = ["FORMATS", "Export", "ExportOptions", "export_bundle", "why_not_export"]
