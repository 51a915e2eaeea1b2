"""Microsoft's V1 layout, in which the three unilm modules and the bundled sample are stored.

Source: microsoft/unilm, Diff-Transformer, ``multihead_diffattn.py`` and ``multihead_flashdiff_{1,2}.py``. Its rows are
in canonical order already, so a key table is all there is. An early revision has no ``subln.weight``.
"""

REQUIRED = (
    "q_proj.weight",
    "k_proj.weight",
    "v_proj.weight",
    "out_proj.weight",
    "lambda_q1",
    "lambda_k1",
    "lambda_q2",
    "lambda_k2",
)
OPTIONAL = ("subln.weight",)
NORM_EPS = 1e-5

__all__ = ["NORM_EPS", "OPTIONAL", "REQUIRED"]
