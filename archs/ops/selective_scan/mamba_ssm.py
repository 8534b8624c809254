"""The selective scan through the mamba-ssm package's CUDA kernels (Gu and Dao, arXiv 2312.00752,
section 3.3). Glossary in archs/ops/selective_scan."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from archs.ops.operation import ImplementationUnavailable

# Tokens of one block of the initial state's share, which is (B, tokens, E, N) large.
BLOCK_TOKENS = 64


def _check(x: Tensor) -> None:
    """Raises ImplementationUnavailable for float64, which the kernels do not take."""
    if x.dtype == torch.float64:
        raise ImplementationUnavailable(
            "implementation 'mamba_ssm' of selective_scan takes float32, bfloat16 or float16, not "
            "torch.float64; use 'plain'."
        )


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See archs.ops.selective_scan.selective_scan.

    The kernel starts from zeros and gives no gradient through the final state. An initial state's
    share, linear in it, is added in plain PyTorch.
    Raises ImplementationUnavailable for float64 or where the package was built without this kernel.
    """
    _check(x)
    if importlib.util.find_spec("selective_scan_cuda") is None:
        raise ImplementationUnavailable(
            "the installed mamba_ssm lacks the compiled selective_scan_cuda; reinstall it with "
            "MAMBA_KEEP_CUDA_BUILD=TRUE pip install mamba-ssm --no-build-isolation."
        )
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    A = A.float().contiguous()
    # The kernel wants channels before tokens, and x, dt, B and C of one dtype.
    u, delta, b, c = (tensor.to(x.dtype).transpose(1, 2).contiguous() for tensor in (x, dt, B, C))
    y, last = selective_scan_fn(u, delta, A, b, c, D=D.float(), return_last_state=True)
    y, last = y.transpose(1, 2), last.float()
    if initial_state is None:
        return y, last
    elapsed = dt.float().cumsum(1)
    shares = []
    for first in range(0, x.shape[1], BLOCK_TOKENS):
        tokens = slice(first, first + BLOCK_TOKENS)
        decayed = torch.exp(elapsed[:, tokens, :, None] * A) * initial_state[:, None]
        shares.append(torch.einsum("bten,btn->bte", decayed, C[:, tokens].float()))
    final = last + torch.exp(elapsed[:, -1, :, None] * A) * initial_state
    return y + torch.cat(shares, dim=1).to(x.dtype), final


def selective_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> Tensor:
    """See archs.ops.selective_scan.selective_step. Raises ImplementationUnavailable for float64."""
    _check(x)
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    A, D, dt = A.float(), D.float(), dt.float()
    # The package reads strides of the bias even where there is none to add.
    no_bias = torch.zeros_like(D)
    return selective_state_update(state, x, dt, A, B, C, D=D, dt_bias=no_bias, dt_softplus=False)
