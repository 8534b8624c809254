"""TTT-Linear and TTT-MLP (Sun et al. 2024, arXiv 2407.04620): layers whose state is a small model,
trained on the sequence while reading it. Parameters bear the names of the published code."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.base import Flops, Mixer, Phase
from archs.layers import CausalConvolution, rotary, undecayed
from archs.ops.elementwise import gelu
from archs.ops.precision import accumulation_dtype
from archs.ops.ttt_linear import OPERATION as LINEAR
from archs.ops.ttt_linear import TTTLinearWeights, ttt_linear
from archs.ops.ttt_mlp import OPERATION as MLP
from archs.ops.ttt_mlp import TTTMLPWeights, ttt_mlp

InnerWeights = TTTLinearWeights | TTTMLPWeights


class TTTState(NamedTuple):
    """inner: the inner model and its open gradient; tails (B, D, W): the convolutions on q and k."""

    inner: InnerWeights
    tails: tuple[Tensor, ...]
    num_tokens: int


class TTTMixer(Mixer):
    """The part that both layers share: projections, rotary positions modulo the mini-batch, the learned step
    size and the output norm.

    mini_batch_tokens: tokens whose inner gradients are taken at the same weights, b.
    base_lr:     the inner step size before its learned factors.
    base_lr_start: where base_lr starts in training, None for no warm-up; see `set_training_progress`.
    share_qk:    one projection for q and k, told apart by convolutions of conv_width (the published
                 layer's Mamba backbone, section 2.7); else a projection each and no convolution.
    use_gate:    y * gelu(g_proj x) before the output projection (Mamba backbone).
    Raises ValueError where heads do not divide the width or a size is not positive.
    """

    run_inner: ClassVar[Callable[..., tuple[Tensor, Any]]]
    weights_class: ClassVar[type[InnerWeights]]

    def __init__(
        self,
        *,
        d_model: int,
        num_heads: int,
        mini_batch_tokens: int,
        base_lr: float,
        base_lr_start: float | None,
        rope_theta: float,
        share_qk: bool,
        use_gate: bool,
        conv_width: int,
        norm_eps: float,
        implementation: str,
    ) -> None:
        super().__init__()
        if num_heads < 1 or d_model % num_heads or (d_model // num_heads) % 2:
            raise ValueError(f"num_heads={num_heads} must divide d_model={d_model} into heads of even width")
        if mini_batch_tokens < 1:
            raise ValueError(f"mini_batch_tokens={mini_batch_tokens} must be positive")
        if base_lr <= 0:
            raise ValueError(f"base_lr={base_lr} must be positive")
        self.num_heads, self.head_width = num_heads, d_model // num_heads
        self.mini_batch_tokens, self.rope_theta = mini_batch_tokens, rope_theta
        self.base_lr, self.base_lr_start, self.base_lr_scale = base_lr, base_lr_start, 1.0
        self.norm_eps, self.implementation = norm_eps, implementation

        def projection() -> nn.Linear:
            return nn.Linear(d_model, d_model, bias=False)

        self.q_proj, self.v_proj, self.o_proj = projection(), projection(), projection()
        self.k_proj = None if share_qk else projection()
        self.g_proj = projection() if use_gate else None
        self.conv_q = CausalConvolution(d_model=d_model, width=conv_width) if share_qk else None
        self.conv_k = CausalConvolution(d_model=d_model, width=conv_width) if share_qk else None
        self.learnable_token_idx = nn.Parameter(torch.zeros(mini_batch_tokens))
        self.learnable_ttt_lr_weight = nn.Parameter(torch.randn(num_heads, 1, d_model) * 0.02)
        self.learnable_ttt_lr_bias = undecayed(torch.zeros(num_heads, 1))
        self.ttt_norm_weight = undecayed(torch.ones(num_heads, self.head_width))
        self.ttt_norm_bias = undecayed(torch.zeros(num_heads, self.head_width))
        self.post_norm = nn.LayerNorm(d_model, eps=norm_eps)

    @abstractmethod
    def _inner_weights(self) -> tuple[Tensor, ...]:
        """Return the learned start of the inner model, (H, in + 1, out) per layer with the bias last."""

    @abstractmethod
    def _inner_products(self, num_tokens: int, is_whole: bool) -> float:
        """Return FLOPs per token and head of the inner model's products, for mini-batches of num_tokens in
        one call; `is_whole` where these fill the mini-batch, so that no gradient stays open."""

    def set_training_progress(self, fraction: float) -> None:
        """Warm base_lr up, linearly from base_lr_start, over the outer learning rate's warm-up
        (arXiv 2407.04620, appendix C). `fraction` of that warm-up is done; a trainer calls it before
        each step. The scale is not saved: a loaded model uses the full base_lr."""
        if self.base_lr_start is not None:
            start = self.base_lr_start / self.base_lr
            self.base_lr_scale = start + (1.0 - start) * min(1.0, fraction)

    def _initial(self, batch_size: int) -> InnerWeights:
        dtype = accumulation_dtype(self.q_proj.weight.dtype)
        weights = [w.to(dtype).expand(batch_size, -1, -1, -1) for w in self._inner_weights()]
        return self.weights_class(*weights, *(torch.zeros_like(w) for w in weights))

    def _project(self, x: Tensor, tails: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, D) -> q, k, v (B, C, D); `tails` are updated in place, none for whole sequences."""
        q, v = self.q_proj(x), self.v_proj(x)
        if self.k_proj is not None:
            return q, self.k_proj(x), v
        if tails:
            q, k = (conv.prefill(q, tail)[0] for conv, tail in zip(self._convs(), tails, strict=True))
        else:
            q, k = (conv(q) for conv in self._convs())
        return q, k, v

    def _rotate(self, x: Tensor, position: int) -> Tensor:
        """Interleaved rotary positions modulo the mini-batch, x (B, C, H, K)."""
        num_tokens, b = x.shape[1], self.mini_batch_tokens
        if num_tokens <= b:
            positions = torch.arange(position, position + num_tokens, device=x.device) % b
            return rotary(x, positions, theta=self.rope_theta, is_interleaved=True)
        end = -(position + num_tokens) % b  # whole mini-batches share one small table of angles
        if position or end:
            x = F.pad(x, (0, 0, 0, 0, position, end))
        positions = torch.arange(b, device=x.device)
        x = rotary(x.unflatten(1, (-1, b)), positions, theta=self.rope_theta, is_interleaved=True)
        return x.flatten(1, 2)[:, position : position + num_tokens]

    def _mix(
        self, x: Tensor, inner: InnerWeights, tails: tuple[Tensor, ...], num_tokens: int
    ) -> tuple[Tensor, InnerWeights]:
        """x (B, C, D) after num_tokens tokens -> (B, C, D)."""
        position = num_tokens % self.mini_batch_tokens
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in self._project(x, tails))
        lr = F.linear(x, self.learnable_ttt_lr_weight[:, 0], self.learnable_ttt_lr_bias[:, 0]).sigmoid()
        lr = lr * (self.base_lr * self.base_lr_scale / self.head_width)
        counts = torch.arange(1, self.mini_batch_tokens + 1, device=x.device)
        token_scale = (1.0 / counts.to(self.learnable_token_idx) + self.learnable_token_idx).clamp_min(0.0)
        q, k = self._rotate(q, position), self._rotate(k, position)
        norm = (self.ttt_norm_weight, self.ttt_norm_bias)
        options = {"norm_eps": self.norm_eps, "implementation": self.implementation}
        y, inner = self.run_inner(q, k, v, lr, token_scale, *norm, inner, position, **options)
        y = self.post_norm(y.flatten(2))
        if self.g_proj is not None:
            y = gelu(self.g_proj(x)) * y
        return self.o_proj(y), inner

    def forward(self, x: Tensor) -> Tensor:
        return self._mix(x, self._initial(x.shape[0]), (), 0)[0]

    def init_state(self, batch_size: int, max_context_tokens: int) -> TTTState:
        del max_context_tokens
        with torch.no_grad():
            inner = self._initial(batch_size)
            inner = type(inner)(*(w.contiguous() for w in inner))
        return TTTState(inner, tuple(conv.init_tail(batch_size) for conv in self._convs()), 0)

    def prefill(self, x: Tensor, state: TTTState) -> tuple[Tensor, TTTState]:
        y, inner = self._mix(x, state.inner, state.tails, state.num_tokens)
        return y, TTTState(inner, state.tails, state.num_tokens + x.shape[1])

    def decode(self, x: Tensor, state: TTTState) -> tuple[Tensor, TTTState]:
        y, state = self.prefill(x[:, None], state)
        return y[:, 0], state

    def step_kind(self, num_tokens: int) -> int:
        """Return the place in the mini-batch: rotary positions and token scales differ, and the last token's
        step moves the weights."""
        return num_tokens % self.mini_batch_tokens

    def _convs(self) -> tuple[CausalConvolution, ...]:
        return () if self.conv_q is None or self.conv_k is None else (self.conv_q, self.conv_k)

    def _num_inner_weights(self) -> int:
        return sum(w.numel() for w in self._inner_weights())

    def state_bytes_at(self, batch_size: int, context_tokens: int) -> int:
        """2 H (K^2 + K) numbers (Linear) or 2 H (8 K^2 + 5 K) (MLP), weights and open gradient, and
        the tails; the context's length does not matter."""
        del context_tokens
        element_size = accumulation_dtype(self.q_proj.weight.dtype).itemsize
        tails = sum(conv.tail_bytes(batch_size) for conv in self._convs())
        return 2 * batch_size * self._num_inner_weights() * element_size + tails

    def flops(self, context_tokens: int, phase: Phase) -> Flops:
        """Count per token: 2 D^2 per projection, 2 D H the step size, the convolutions, and the inner
        products, which differ between whole mini-batches and a part of one. scan: decode adds the open
        gradient to the weights once a mini-batch, 2 FLOPs a weight. Norms and GELU are not counted."""
        d_model = self.q_proj.weight.shape[0]
        num_projections = 3 + (self.k_proj is not None) + (self.g_proj is not None)
        outer = 2.0 * d_model * (d_model * num_projections + self.num_heads)
        outer += sum(conv.flops_per_token() for conv in self._convs())
        b, num_heads = self.mini_batch_tokens, self.num_heads
        if phase == "decode":
            inner = num_heads * self._inner_products(1, is_whole=False)
            return Flops(matmul=outer + inner, scan=2.0 * self._num_inner_weights() / b)
        part = context_tokens % b
        inner = (context_tokens - part) * self._inner_products(b, is_whole=True)
        inner += part * self._inner_products(part, is_whole=False)
        return Flops(matmul=context_tokens * outer + num_heads * inner)


class TTTLinear(TTTMixer):
    """TTT with a linear inner model, W (K, K) and a bias a head. See `TTTMixer`."""

    operation, run_inner, weights_class = LINEAR, staticmethod(ttt_linear), TTTLinearWeights

    def __init__(
        self,
        *,
        d_model: int,
        num_heads: int,
        mini_batch_tokens: int = 16,
        base_lr: float = 1.0,
        base_lr_start: float | None = None,
        rope_theta: float = 10_000.0,
        share_qk: bool = True,
        use_gate: bool = True,
        conv_width: int = 4,
        norm_eps: float = 1e-6,
        implementation: str = "auto",
    ) -> None:
        super().__init__(
            d_model=d_model,
            num_heads=num_heads,
            mini_batch_tokens=mini_batch_tokens,
            base_lr=base_lr,
            base_lr_start=base_lr_start,
            rope_theta=rope_theta,
            share_qk=share_qk,
            use_gate=use_gate,
            conv_width=conv_width,
            norm_eps=norm_eps,
            implementation=implementation,
        )
        self.W1 = nn.Parameter(torch.randn(num_heads, self.head_width, self.head_width) * 0.02)
        self.b1 = undecayed(torch.zeros(num_heads, 1, self.head_width))

    def _inner_weights(self) -> tuple[Tensor, ...]:
        return (torch.cat((self.W1, self.b1), dim=1),)

    def _inner_products(self, num_tokens: int, is_whole: bool) -> float:
        """k W, q W and k' h, each 2 (K + 1) K, and q k' and its product with h, 2 b (2 K + 1); an
        open mini-batch has q G beside q W. The bias rides along as a row of W, which saves the
        2 b K of the published count 6 K^2 + 6 b K."""
        width = self.head_width
        num_products = 3 if is_whole else 4
        return 2.0 * (num_products * (width + 1) * width + num_tokens * (2 * width + 1))


class TTTMLP(TTTMixer):
    """TTT with a two-layer inner model, K -> 4K -> K with GELU. See `TTTMixer`."""

    operation, run_inner, weights_class = MLP, staticmethod(ttt_mlp), TTTMLPWeights

    def __init__(
        self,
        *,
        d_model: int,
        num_heads: int,
        mini_batch_tokens: int = 16,
        base_lr: float = 0.1,
        base_lr_start: float | None = 0.01,
        rope_theta: float = 10_000.0,
        share_qk: bool = True,
        use_gate: bool = True,
        conv_width: int = 4,
        norm_eps: float = 1e-6,
        implementation: str = "auto",
    ) -> None:
        super().__init__(
            d_model=d_model,
            num_heads=num_heads,
            mini_batch_tokens=mini_batch_tokens,
            base_lr=base_lr,
            base_lr_start=base_lr_start,
            rope_theta=rope_theta,
            share_qk=share_qk,
            use_gate=use_gate,
            conv_width=conv_width,
            norm_eps=norm_eps,
            implementation=implementation,
        )
        width, hidden = self.head_width, 4 * self.head_width
        self.W1 = nn.Parameter(torch.randn(num_heads, width, hidden) * 0.02)
        self.b1 = undecayed(torch.zeros(num_heads, 1, hidden))
        self.W2 = nn.Parameter(torch.randn(num_heads, hidden, width) * 0.02)
        self.b2 = undecayed(torch.zeros(num_heads, 1, width))

    def _inner_weights(self) -> tuple[Tensor, ...]:
        return torch.cat((self.W1, self.b1), dim=1), torch.cat((self.W2, self.b2), dim=1)

    def _inner_products(self, num_tokens: int, is_whole: bool) -> float:
        """Count as TTTLinear for both layers, with the gradient's way back through W2, 2 x 4 K^2."""
        width, hidden = self.head_width, 4 * self.head_width
        num_products = 3 if is_whole else 4
        layers = num_products * ((width + 1) * hidden + (hidden + 1) * width) + hidden * width
        return 2.0 * (layers + num_tokens * (2 * width + 1 + 2 * hidden + 1))
