"""Verification: an artifact is accepted when it computes what its weights and config say."""
