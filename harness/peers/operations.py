"""Our operations as `harness.peers.kernels` calls them: inputs by size, outputs, parity with a definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hydra.utils import get_method
from torch import Tensor

Sizes = Mapping[str, int]
Call = Callable[[], object]
#: Inputs -> outputs, the first of which is the sequence's.
Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One of our operations.

    make:      sizes -> its inputs in float32, all of them leaves of training; those of the tokens come
               first, `num_token_inputs` of them, and take the line's dtype.
    run:       inputs, sizes, implementation -> outputs.
    is_serial: it walks the sequence in steps that depend on each other.
    """

    make: Callable[[Sizes], list[Tensor]]
    run: Callable[[Sequence[Tensor], Sizes, str], Sequence[Tensor]]
    num_token_inputs: int
    is_serial: bool = True

    def inputs(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """On the device, the tokens' in dtype."""
        torch.manual_seed(0)
        made = self.make(sizes)
        return [t.to(device, dtype if i < self.num_token_inputs else None) for i, t in enumerate(made)]

    def bound(self, sizes: Sizes, implementation: str) -> Run:
        """`run` with sizes and implementation."""
        return lambda inputs: self.run(inputs, sizes, implementation)


def _unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def _ttt_inputs(sizes: Sizes) -> list[Tensor]:
    """q, k, v, lr, token_scale, ln_weight, ln_bias; the inner model's weights are added."""
    batch, tokens, heads, width, b = sizes_of(sizes, *TTT_SIZES)
    return [
        *(torch.randn(batch, tokens, heads, width) for _ in range(3)),
        torch.randn(batch, tokens, heads).sigmoid() / width,
        1 / torch.arange(1, b + 1),
        1 + 0.1 * torch.randn(heads, width),
        0.1 * torch.randn(heads, width),
    ]


def _inner(sizes: Sizes, rows: int, columns: int) -> Tensor:
    """Return an inner matrix with its bias in the last row, (B, H, rows + 1, columns)."""
    return torch.randn(sizes["batch_size"], sizes["num_heads"], rows + 1, columns) * 0.5 / rows**0.5


def _ttt_linear_inputs(sizes: Sizes) -> list[Tensor]:
    width = sizes["head_width"]
    return [*_ttt_inputs(sizes), _inner(sizes, width, width)]


def _ttt_mlp_inputs(sizes: Sizes) -> list[Tensor]:
    width = sizes["head_width"]
    return [*_ttt_inputs(sizes), _inner(sizes, width, 4 * width), _inner(sizes, 4 * width, width)]


def _ttt(name: str, weights_class: str) -> Callable[[Sequence[Tensor], Sizes, str], Sequence[Tensor]]:
    def run(inputs: Sequence[Tensor], sizes: Sizes, implementation: str) -> Sequence[Tensor]:
        weights = inputs[7:]
        make_state = get_method(f"archs.ops.{name}.{weights_class}")
        state = make_state(*weights, *(torch.zeros_like(w) for w in weights))
        function = get_method(f"archs.ops.{name}.{name}")
        y, after = function(*inputs[:7], state, 0, implementation=implementation)
        return [y, *after]

    return run


def _memory_inputs(sizes: Sizes) -> list[Tensor]:
    batch, tokens, heads, width, chunk = sizes_of(sizes, *MEMORY_SIZES)
    hidden = 4 * width  # as harness.peers.titans_layers has it
    gate = (batch, tokens, heads)
    return [
        *(_unit(batch, tokens, heads, width) for _ in range(3)),
        0.02 * torch.rand(gate),
        torch.rand(gate) / chunk,
        0.75 * torch.rand(gate),
        torch.randn(batch, heads, width, hidden) / width**0.5,
        torch.randn(batch, heads, hidden, width) / hidden**0.5,
    ]


def _memory(inputs: Sequence[Tensor], sizes: Sizes, implementation: str) -> Sequence[Tensor]:
    weights = tuple(inputs[6:])
    make_state = get_method("archs.ops.neural_memory.NeuralMemoryState")
    state = make_state(tuple(w.clone() for w in weights), weights, tuple(map(torch.zeros_like, weights)))
    function = get_method("archs.ops.neural_memory.neural_memory")
    chunk = sizes["chunk_tokens"]
    y, after = function(*inputs[:6], state, 0, chunk_tokens=chunk, implementation=implementation)
    return [y, *after.weights, *after.momentum]


def _scan_inputs(sizes: Sizes) -> list[Tensor]:
    batch, tokens, channels, state = sizes_of(sizes, *SCAN_SIZES)
    maps = [torch.randn(batch, tokens, state) for _ in range(2)]
    decay = -torch.arange(1.0, state + 1).repeat(channels, 1)
    dt = 0.1 * torch.rand(batch, tokens, channels)
    return [torch.randn(batch, tokens, channels), *maps, dt, decay, torch.randn(channels)]


def _scan(inputs: Sequence[Tensor], sizes: Sizes, implementation: str) -> Sequence[Tensor]:
    x, B, C, dt, A, D = inputs
    function = get_method("archs.ops.selective_scan.selective_scan")
    return function(x, dt, A, B, C, D, implementation=implementation)


def _ssd_inputs(sizes: Sizes) -> list[Tensor]:
    batch, tokens, heads, width, state, _ = sizes_of(sizes, *SSD_SIZES)
    maps = [torch.randn(batch, tokens, 1, state) for _ in range(2)]
    dt = 0.1 * torch.rand(batch, tokens, heads)
    return [torch.randn(batch, tokens, heads, width), *maps, dt, -1 - torch.rand(heads), torch.randn(heads)]


def _ssd(inputs: Sequence[Tensor], sizes: Sizes, implementation: str) -> Sequence[Tensor]:
    x, B, C, dt, A, D = inputs
    function = get_method("archs.ops.ssd.ssd")
    chunk = sizes["chunk_tokens"]
    return function(x, dt, A, B, C, D, chunk_tokens=chunk, implementation=implementation)


def _attention_inputs(sizes: Sizes) -> list[Tensor]:
    batch, tokens, heads, width = sizes_of(sizes, *ATTENTION_SIZES)
    return [torch.randn(batch, tokens, heads, width) for _ in range(3)]


def _attention(inputs: Sequence[Tensor], sizes: Sizes, implementation: str) -> Sequence[Tensor]:
    del sizes
    return [get_method("archs.ops.attention.attention")(*inputs, implementation=implementation)]


def sizes_of(sizes: Sizes, *names: str) -> list[int]:
    return [sizes[name] for name in names]


ATTENTION_SIZES = ("batch_size", "num_tokens", "num_heads", "head_width")
TTT_SIZES = (*ATTENTION_SIZES, "mini_batch_tokens")
MEMORY_SIZES = (*ATTENTION_SIZES, "chunk_tokens")
SCAN_SIZES = ("batch_size", "num_tokens", "channels", "state_width")
SSD_SIZES = (*ATTENTION_SIZES, "state_width", "chunk_tokens")

KERNELS = {
    "ttt_linear": Kernel(
        make=_ttt_linear_inputs, run=_ttt("ttt_linear", "TTTLinearWeights"), num_token_inputs=4
    ),
    "ttt_mlp": Kernel(make=_ttt_mlp_inputs, run=_ttt("ttt_mlp", "TTTMLPWeights"), num_token_inputs=4),
    "neural_memory": Kernel(make=_memory_inputs, run=_memory, num_token_inputs=3),
    "selective_scan": Kernel(make=_scan_inputs, run=_scan, num_token_inputs=3, is_serial=False),
    "ssd": Kernel(make=_ssd_inputs, run=_ssd, num_token_inputs=3, is_serial=False),
    "attention": Kernel(make=_attention_inputs, run=_attention, num_token_inputs=3, is_serial=False),
}


def relative_error(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """Return the largest |a - e| / |e| in the 2-norm, NaN where one is."""
    errors = []
    for one, other in zip(actual, expected, strict=True):
        if one is None or other is None:
            continue
        a, e = one.detach().to("cpu", torch.float64), other.detach().to("cpu", torch.float64)
        errors.append(((a - e).norm() / e.norm().clamp_min(1e-30)).item())
    return torch.tensor(errors).max().item()  # not Python's max, which drops a NaN


def values_and_gradients(
    run: Run, inputs: Sequence[Tensor], num_outputs: int | None = None
) -> list[Tensor | None]:
    """Return the first outputs, default all, and the gradients of every input for random ones of these
    outputs, the same each time."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = list(run(leaves))[:num_outputs]
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(t.shape, generator=generator).bfloat16().to(t) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, given, allow_unused=True)]


def timed_call(run: Run, inputs: Sequence[Tensor], *, is_training: bool) -> Call:
    """Run the forward pass without gradients, or forward and backward to every input."""
    if not is_training:

        def forward() -> object:
            with torch.no_grad():
                return run(inputs)

        return forward
    leaves = [t.detach().requires_grad_() for t in inputs]
    with torch.no_grad():
        gradient = torch.randn_like(run(inputs)[0])

    def both() -> object:
        return torch.autograd.grad(run(leaves)[0], leaves, gradient, allow_unused=True)

    return both


def kernel_error(
    name: str,
    implementation: str,
    sizes: Sizes,
    device: torch.device,
    dtype: torch.dtype,
    num_outputs: int | None = None,
) -> float:
    """Compare an implementation with the operation's reference in float64 on a CPU; all outputs, or the
    first: a package may give no gradient through a final state."""
    kernel = KERNELS[name]
    inputs = kernel.inputs(sizes, device, dtype)
    exact = [t.to("cpu", torch.float64) for t in inputs]
    actual = values_and_gradients(kernel.bound(sizes, implementation), inputs, num_outputs)
    expected = values_and_gradients(kernel.bound(sizes, "reference"), exact, num_outputs)
    return relative_error(actual, expected)
