"""Bundles inside third-party libraries; each module needs the library that it is named after."""
