"""Bundles in servers of the Open Inference Protocol: one translation, and a thin class per server."""

from diffdeploy.engines.oip.protocol import Served, TensorMetadata, WireTensor
from diffdeploy.engines.oip.serving import ServeRequest, serve, server_names

__all__ = ["ServeRequest", "Served", "TensorMetadata", "WireTensor", "serve", "server_names"]
