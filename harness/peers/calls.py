"""The calls that the lines of `harness.peers.kernels` time, ours and the peers', and how far each is from its
definition."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.config.build import instantiate
from harness.peers.operations import (
    ATTENTION_SIZES,
    KERNELS,
    Call,
    Run,
    Sizes,
    kernel_error,
    relative_error,
    sizes_of,
    timed_call,
    values_and_gradients,
)
from harness.peers.titans import titans_layers
from harness.train.loop import autocast

#: Device, dtype, sizes -> our call, and what makes the peer's.
MakeCalls = Callable[[torch.device, torch.dtype, Sizes], tuple[Call, Callable[[], Call]]]
#: Sizes, device, dtype -> a relative error.
MeasureError = Callable[[Sizes, torch.device, torch.dtype], float]
#: The inputs of ours, sizes -> a call on inputs of theirs, and these.
Peer = Callable[[Sequence[Tensor], Sizes], tuple[Run, list[Tensor]]]

TITANS_SIZES = ("batch_size", "num_tokens", "d_model", "num_heads", "chunk_tokens")


def operation_calls(name: str, implementation: str, peer: str | Peer, *, is_training: bool) -> MakeCalls:
    """`peer` is another implementation of the operation, or what makes a call of a package's."""
    kernel = KERNELS[name]

    def make(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> tuple[Call, Callable[[], Call]]:
        inputs = kernel.inputs(sizes, device, dtype)
        ours = timed_call(kernel.bound(sizes, implementation), inputs, is_training=is_training)

        def theirs() -> Call:
            run, tensors = (
                (kernel.bound(sizes, peer), inputs) if isinstance(peer, str) else peer(inputs, sizes)
            )
            return timed_call(run, tensors, is_training=is_training)

        return ours, theirs

    return make


def implementation_error(name: str, implementation: str) -> MeasureError:
    """Compare a peer that is another implementation: the sequence's output, and all gradients from it."""
    return lambda sizes, device, dtype: kernel_error(name, implementation, sizes, device, dtype, 1)


def peer_error(name: str, peer: Peer, definition: Callable[[Run], Run] | None = None) -> MeasureError:
    """Compare the very call that is timed, output and all gradients, in its own layout. definition: our
    operation's reference -> the same on tensors of that layout; None where the layout is ours."""

    def error(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> float:
        kernel = KERNELS[name]
        run, tensors = peer(kernel.inputs(sizes, device, dtype), sizes)
        reference = kernel.bound(sizes, "reference")
        exact = [t.to("cpu", torch.float64) for t in tensors]
        expected = values_and_gradients(definition(reference) if definition else reference, exact, 1)
        return relative_error(values_and_gradients(run, tensors, 1), expected)

    return error


def fla(inputs: Sequence[Tensor], sizes: Sizes, *, name: str = "fused_chunk") -> tuple[Run, list[Tensor]]:
    """flash-linear-attention's TTT-Linear, or with name="naive" its definition."""
    q, k, v, lr, _, ln_weight, ln_bias, _ = inputs
    module = importlib.import_module("fla.ops.ttt" + (".naive" if name == "naive" else ""))
    if name == "naive":
        function, size = module.chunk_ttt_linear_ref, "mini_batch_size"
    else:
        function, size = module.fused_chunk_ttt_linear, "chunk_size"
    options = {size: sizes["mini_batch_tokens"]}
    theirs = [q, k, v, ln_weight.to(q.dtype), ln_bias.to(q.dtype), lr[..., None].contiguous()]
    return (lambda tensors: function(*tensors, **options)[:1]), theirs


def fla_error(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> float:
    """fla's kernel against fla's own definition, which computes in float32."""
    inputs = KERNELS["ttt_linear"].inputs(sizes, device, dtype)
    run, theirs = fla(inputs, sizes)
    naive, _ = fla(inputs, sizes, name="naive")
    return relative_error(values_and_gradients(run, theirs), values_and_gradients(naive, theirs))


def mamba_ssm(inputs: Sequence[Tensor], sizes: Sizes) -> tuple[Run, list[Tensor]]:
    """Run the CUDA scan in its own layout, channels before tokens, all tokens' inputs of one dtype: the peer
    does not pay for our layout."""
    del sizes
    scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    x, B, C, dt, A, D = inputs
    theirs = [t.to(x.dtype).transpose(1, 2).contiguous() for t in (x, dt, B, C)]

    def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        u, delta, b, c, a, d = tensors
        return [scan(u, delta, a, b, c, D=d)]

    return run, [*theirs, A, D]


def channels_first(reference: Run) -> Run:
    """Our selective scan on tensors in the order and the layout of `mamba_ssm`."""

    def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        x, dt, B, C = (t.transpose(1, 2) for t in tensors[:4])
        return [reference([x, B, C, dt, *tensors[4:]])[0].transpose(1, 2)]

    return run


def sdpa_backend(backend: str) -> Peer:
    """Run one of torch's own kernels of attention, a member of torch.nn.attention.SDPBackend."""

    def make(inputs: Sequence[Tensor], sizes: Sizes) -> tuple[Run, list[Tensor]]:
        del sizes

        def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
            q, k, v = (t.transpose(1, 2) for t in tensors)
            attention = torch.nn.attention
            with attention.sdpa_kernel(getattr(attention.SDPBackend, backend)):
                return [F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)]

        return run, list(inputs)

    return make


def titans_calls(*, is_training: bool) -> MakeCalls:
    """Our memory with its projections and titans-pytorch's, parameters in float32 under autocast."""

    def make(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> tuple[Call, Callable[[], Call]]:
        batch, tokens, width, heads, chunk = sizes_of(sizes, *TITANS_SIZES)
        x = torch.randn(batch, tokens, width, device=device)

        def call_of(layer: torch.nn.Module, forward: Callable[[Tensor], Tensor]) -> Call:
            parameters = [p for p in layer.parameters() if p.requires_grad]

            def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
                with autocast(device, dtype):
                    return [forward(tensors[0])]

            if not is_training:
                return timed_call(run, [x], is_training=False)
            leaf = x.detach().requires_grad_()

            def both() -> object:
                (y,) = run([leaf])
                return torch.autograd.grad(y.float().sum(), [leaf, *parameters], allow_unused=True)

            return both

        ours = titans_layers(width, heads, chunk, implementation="triton")[0]().to(device)
        our_call = call_of(ours, lambda x: ours.step(x, ours.init_memory(x.shape[0]), 0, None)[0])

        def theirs() -> Call:
            peer = titans_layers(width, heads, chunk)[1]().to(device)
            return call_of(peer, lambda x: peer(x)[0])

        return our_call, theirs

    return make


def titans_layer_error(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> float:
    """Compare our layer's output under autocast with the same layer whose operation is its reference."""
    batch, tokens, heads, head_width = sizes_of(sizes, *ATTENTION_SIZES)
    torch.manual_seed(0)
    layer = titans_layers(heads * head_width, heads, sizes["chunk_tokens"])[0]().to(device)
    x = torch.randn(batch, tokens, heads * head_width).to(device)
    answers = []
    for layer.implementation in ("triton", "reference"):
        with torch.no_grad(), autocast(device, dtype):
            answers.append([layer.step(x, layer.init_memory(batch), 0, None)[0]])
    return relative_error(*answers)


def titans_error(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> float:
    """titans-pytorch's layer in float32 on the device against itself in float64 on a CPU."""
    del dtype
    width, heads, chunk = sizes["num_heads"] * sizes["head_width"], sizes["num_heads"], sizes["chunk_tokens"]
    peer = titans_layers(width, heads, chunk)[1]()
    x = torch.randn(1, 4 * chunk, width)
    with torch.no_grad():
        actual = peer.to(device)(x.to(device))[0]
        expected = peer.to("cpu", torch.float64)(x.double())[0]
    return relative_error([actual], [expected])


OUR_LAYER, PEER_LAYER = ("archs.ttt.TTTLinear", "triton"), ("archs.attention.Attention", "auto")


def layer_calls(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> tuple[Call, Callable[[], Call]]:
    """Prefill of a whole layer, projections included: TTT-Linear's and multi-head attention's."""
    batch, tokens, width, heads = sizes_of(sizes, "batch_size", "num_tokens", "d_model", "num_heads")
    x = torch.randn(batch, tokens, width, device=device, dtype=dtype)

    def call_of(target: str, implementation: str) -> Call:
        layer = _layer(target, implementation, width, heads).to(device, dtype)
        state = layer.init_state(batch, tokens)  # once: filling a cache with zeros is no part of a prefill

        def call() -> object:
            with torch.no_grad():
                return layer.prefill(x, state)[0]

        return call

    return call_of(*OUR_LAYER), lambda: call_of(*PEER_LAYER)


def _layer(target: str, implementation: str, width: int, num_heads: int) -> Any:
    sizes = {"d_model": width, "num_heads": num_heads}
    return instantiate({"_target_": target, **sizes, "implementation": implementation}).eval()


def layer_error(target: str, implementation: str) -> MeasureError:
    """Compare a layer's prefill, output and state, with the same layer with the same weights, moved off their
    initial values, whose operation is its reference. Both round to dtype alike, so that what is compared is
    the operation in its place. Heads of the line's width, as many as `sizes` has."""

    def error(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> float:
        batch, tokens, heads, head_width = sizes_of(sizes, *ATTENTION_SIZES)
        torch.manual_seed(0)
        layer = _layer(target, implementation, heads * head_width, heads)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
            layer, x = layer.to(device, dtype), torch.randn(batch, tokens, heads * head_width)
            x = x.to(device, dtype)
            answers = []
            for layer.implementation in (implementation, "reference"):
                y, state = layer.prefill(x, layer.init_state(batch, tokens))
                answers.append([y, *_tensors(state)])
        return relative_error(*answers)

    return error


def _tensors(state: Any) -> list[Tensor]:
    """Yield the tensors in nested tuples."""
    if isinstance(state, Tensor):
        return [state]
    return [t for part in state for t in _tensors(part)] if isinstance(state, tuple) else []
