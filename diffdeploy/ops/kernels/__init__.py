"""Triton kernels of `fused`; nothing imports this room before a call runs in it, since it needs ``triton``."""
