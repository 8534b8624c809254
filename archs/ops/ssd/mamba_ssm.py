"""State-space duality through the mamba-ssm package's Triton kernels (Dao and Gu, arXiv 2405.21060).
Glossary in archs/ops/ssd."""

from __future__ import annotations

import torch
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from torch import Tensor

from archs.ops.operation import ImplementationUnavailable


def _check(x: Tensor) -> None:
    """Raises ImplementationUnavailable for float64, which the kernels do not take."""
    if x.dtype == torch.float64:
        raise ImplementationUnavailable(
            "implementation 'mamba_ssm' of ssd takes float32, bfloat16 or float16, not torch.float64; "
            "use 'plain'."
        )


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None,
    *,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """See archs.ops.ssd.ssd. Raises ImplementationUnavailable for float64 and for chunks that are not
    a power of two of at least 16 tokens, which the kernels' tiles need."""
    _check(x)
    if chunk_tokens < 16 or chunk_tokens & (chunk_tokens - 1):
        raise ImplementationUnavailable(
            f"implementation 'mamba_ssm' of ssd takes chunks of 16, 32, 64 ... tokens, not "
            f"chunk_tokens={chunk_tokens}."
        )
    if initial_state is not None:
        initial_state = initial_state.float()
    y, final = mamba_chunk_scan_combined(
        x,
        dt.float(),
        A.float(),
        B.to(x.dtype),
        C.to(x.dtype),
        chunk_tokens,
        D=D.float(),
        initial_states=initial_state,
        return_final_states=True,
    )
    return y, final.float()


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> Tensor:
    """See archs.ops.ssd.ssd_step. Raises ImplementationUnavailable for float64."""
    _check(x)
    num_heads, head_width, state_width = state.shape[1:]
    # Views without memory: the kernel recognises the zero strides as one number a head. It reads
    # the strides of the bias even where there is none to add.
    return selective_state_update(
        state,
        x,
        dt.float()[:, :, None].expand(-1, -1, head_width),
        A.float()[:, None, None].expand(-1, head_width, state_width),
        B,
        C,
        D=D.float()[:, None].expand(-1, head_width),
        dt_bias=A.new_zeros(num_heads, 1, dtype=torch.float32).expand(-1, head_width),
        dt_softplus=False,
    )
