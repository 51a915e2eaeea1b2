"""Triton kernels of `fused`. They need ``triton``, so this package is imported only on the first call."""
