"""Both attentions and their difference, weighted by lambda, in one Triton kernel that reads keys and values once.

`diffdeploy.ops.kernels` holds the kernels. The first call imports it, since it needs ``triton``, which comes with torch
for CUDA. With ``TRITON_INTERPRET=1`` Triton runs them on a CPU, slowly.

Shape suffixes: B batch, H heads, S query length, T key length, d stream width, e value width.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from diffdeploy.errors import DiffDeployError, InputError, UnavailableError
from diffdeploy.ops.impl import Impl
from diffdeploy.ops.masks import is_key_padding, require_window_to_slide
from diffdeploy.ops.registry import register
from diffdeploy.ops.request import Request
from diffdeploy.ops.target import runs_on_cuda

__all__ = ["fused", "is_fastest_here", "key_padding", "unsupported"]

_WIDEST = 128
_WIDEST_VALUES = 256
# Shared memory of the largest kernel (streams and values of width 128); an A100 and an H100 have that much.
_SHARED_MEMORY_BYTES = 160 * 1024
# Major compute capability.
_HOPPER = 9
_HAS_TRITON = find_spec("triton") is not None


def unsupported(request: Request) -> DiffDeployError | None:
    """Error for a device, package, dtype, width, scale or mask that the kernels do not support, or ``None``."""
    return _unavailable(request) or _unsupported_numbers(request) or _unsupported_mask(request)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _unavailable(request: Request) -> UnavailableError | None:
    if not runs_on_cuda(request.q) and not _interpreted():
        return UnavailableError(f"fused runs on CUDA only, but the tensors are on {request.device}")
    if not _HAS_TRITON:
        return UnavailableError("fused needs the package triton, which is not installed; it comes with torch for CUDA")
    # This is not checked for a traced graph, which may run on another machine.
    if request.q.is_cuda and not request.traced:
        properties = torch.cuda.get_device_properties(request.q.device)
        shared: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
        if shared < _SHARED_MEMORY_BYTES:
            return UnavailableError(
                f"fused needs {_SHARED_MEMORY_BYTES // 1024} KiB of shared memory per block, as the A100 and later "
                f"data-centre GPUs have, but this device has {shared // 1024}"
            )
    return None


def _unsupported_numbers(request: Request) -> InputError | None:
    sides = (request.q, request.k, request.v)
    if request.dtype not in (torch.float16, torch.bfloat16) or any(side.dtype != request.dtype for side in sides):
        found = ", ".join(str(side.dtype).removeprefix("torch.") for side in sides)
        return InputError(f"fused runs in float16 and bfloat16, but queries, keys and values are {found}")
    if request.dtype == torch.bfloat16 and not runs_on_cuda(request.q):
        return InputError("Triton's interpreter cannot multiply bfloat16 numbers; use float16")
    if request.width > _WIDEST or request.value_width > _WIDEST_VALUES:
        return InputError(
            f"fused takes streams up to a width of {_WIDEST} and values up to {_WIDEST_VALUES}, but these are "
            f"{request.width} and {request.value_width} wide"
        )
    if request.scale <= 0:
        return InputError(f"fused needs a positive scale, but this one is {request.scale}")
    if torch.is_grad_enabled() and any(side.requires_grad for side in (*sides, request.lam)):
        return InputError("fused computes no gradients; call it in torch.no_grad or torch.inference_mode")
    return None


def _unsupported_mask(request: Request) -> InputError | None:
    mask = request.attn_mask
    if mask is None or is_key_padding(mask, request.q.shape[0], request.key_length):
        return None
    return InputError(
        "fused supports only masks that hide the same keys from all queries; accepted: boolean "
        f"[B, 1, 1, {request.key_length}], but this one is {mask.dtype} {list(mask.shape)}"
    )


def is_fastest_here(dtype: torch.dtype, width: int, value_width: int) -> bool:
    """True if `fused` is fastest on this machine's GPU for streams and values of these widths; see docs/fused.md."""
    takes = dtype in (torch.float16, torch.bfloat16) and width <= _WIDEST and value_width <= _WIDEST_VALUES
    return takes and _HAS_TRITON and torch.cuda.is_available() and _is_hopper(None)


def _is_hopper(device: torch.device | None) -> bool:
    return torch.cuda.get_device_capability(device)[0] == _HOPPER


def _cost(request: Request) -> float:
    # `fused` is the fastest at every measured size on an H100 (docs/fused.md). `auto` does not choose it while tracing,
    # since some graphs with it could be loaded only where diffdeploy is installed.
    return 0.05 if not request.traced and request.q.is_cuda and _is_hopper(request.q.device) else 2.0


@register(Impl.FUSED, num_attentions=1, supports=unsupported, cost=_cost, normalises=True)
def fused(request: Request) -> Tensor:
    """Launch one kernel, or two if keys or streams are divided among programs to occupy the GPU.

    Keys are always divided for 16 queries or fewer.

    The softmax, the product with lambda, the difference and the norm are computed in fp32 and rounded once; if values
    are wider than 128, the result of the first stream is also rounded. See `diff_attention` for shapes.

    Args:
        request: a request that `unsupported` does not reject.

    Raises:
        InputError: a window is given without ``causal``.
    """
    from diffdeploy.ops.kernels import operator  # noqa: F401, registers diffdeploy::fused_attention

    require_window_to_slide(request.sliding_window, causal=request.causal)
    if not request.traced and 0 in (request.q.numel(), request.v.numel()):
        return request.q.new_zeros(request.q.shape[0], request.num_heads, request.length, request.value_width)
    norm = request.norm
    output: Tensor = torch.ops.diffdeploy.fused_attention.default(
        request.q,
        request.k,
        request.v,
        request.lam.to(request.q.device),  # a scalar may be on the CPU, as in torch's own operators
        key_padding(request),
        None if norm is None else norm.weight,
        request.causal,
        request.sliding_window,
        request.permutes_key_streams,
        request.scale,
        None if norm is None else norm.eps,
        1.0 if norm is None else norm.factor,
    )
    return output


def key_padding(request: Request) -> Tensor | None:
    """Return the mask as ``[B or 1, T]``, ``True`` for visible keys."""
    return None if request.attn_mask is None else request.attn_mask.reshape(-1, request.key_length)
