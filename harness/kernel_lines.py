"""What `harness.kernels` compares: our side and a peer's, line by line."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.config import instantiate
from harness.kernel_operations import (
    KERNELS,
    Call,
    Run,
    Sizes,
    kernel_error,
    relative_error,
    sizes_of,
    values_and_gradients,
)
from harness.peers import titans_layers
from harness.train import autocast

# The peers that are no implementation of an operation: the inputs of ours -> a call on inputs of theirs


def _fla(inputs: Sequence[Tensor], sizes: Sizes, *, name: str = "fused_chunk") -> tuple[Run, list[Tensor]]:
    q, k, v, lr, _, ln_weight, ln_bias, _ = inputs
    module = importlib.import_module("fla.ops.ttt" + (".naive" if name == "naive" else ""))
    if name == "naive":
        function, size = module.chunk_ttt_linear_ref, "mini_batch_size"
    else:
        function, size = module.fused_chunk_ttt_linear, "chunk_size"
    options = {size: sizes["mini_batch_tokens"]}
    theirs = [q, k, v, ln_weight.to(q.dtype), ln_bias.to(q.dtype), lr[..., None].contiguous()]
    return (lambda tensors: function(*tensors, **options)[:1]), theirs


def _fla_error(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> float:
    """fla's kernel against fla's own definition, which computes in float32."""
    inputs = KERNELS["ttt_linear"].inputs(sizes, device, dtype)
    run, theirs = _fla(inputs, sizes)
    naive, _ = _fla(inputs, sizes, name="naive")
    return relative_error(values_and_gradients(run, theirs), values_and_gradients(naive, theirs))


def _mamba_ssm(inputs: Sequence[Tensor], sizes: Sizes) -> tuple[Run, list[Tensor]]:
    """The CUDA scan in its own layout, channels before tokens, all tokens' inputs of one dtype."""
    del sizes
    scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    x, B, C, dt, A, D = inputs
    theirs = [t.to(x.dtype).transpose(1, 2).contiguous() for t in (x, dt, B, C)]

    def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        u, delta, b, c, a, d = tensors
        return [scan(u, delta, a, b, c, D=d)]

    return run, [*theirs, A, D]


def _sdpa_backend(backend: str) -> Callable[[Sequence[Tensor], Sizes], tuple[Run, list[Tensor]]]:
    def make(inputs: Sequence[Tensor], sizes: Sizes) -> tuple[Run, list[Tensor]]:
        del sizes

        def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
            q, k, v = (t.transpose(1, 2) for t in tensors)
            attention = torch.nn.attention
            with attention.sdpa_kernel(getattr(attention.SDPBackend, backend)):
                return [F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)]

        return run, list(inputs)

    return make


@dataclass(frozen=True, kw_only=True)
class Line:
    """One comparison.

    kernel:        of KERNELS, whose parity is checked.
    peer:          its name, for the table. package: what it is in, None for our own or torch's.
    make:          device, dtype, sizes -> our call and the peer's, None where it is not installed.
    peer_error:    sizes, device, dtype -> the peer's relative error against its own definition.
    peer_tolerance: of peer_error, default that of the dtype.
    sizes:         of the timed call.
    minimum_speed: what we hold ourselves to, None where the line only reports.
    implementation: ours.
    difference:    what is not alike, None where both compute the same.
    """

    kernel: str
    peer: str
    make: Callable[[torch.device, torch.dtype, Sizes], tuple[Call, Callable[[], Call]]]
    sizes: Sizes
    minimum_speed: float | None
    package: str | None = None
    peer_error: Callable[[Sizes, torch.device, torch.dtype], float] | None = None
    peer_tolerance: float | None = None
    implementation: str = "triton"
    difference: str | None = None


def timed_call(run: Run, inputs: Sequence[Tensor], *, is_training: bool) -> Call:
    """The forward pass without gradients, or forward and backward to every input."""
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


def _operation_calls(
    name: str,
    implementation: str,
    peer: str | Callable[[Sequence[Tensor], Sizes], tuple[Run, list[Tensor]]],
    *,
    is_training: bool,
) -> Callable[[torch.device, torch.dtype, Sizes], tuple[Call, Callable[[], Call]]]:
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


def _titans_calls(
    *, is_training: bool
) -> Callable[[torch.device, torch.dtype, Sizes], tuple[Call, Callable[[], Call]]]:
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


def _titans_error(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> float:
    """titans-pytorch's layer in float32 on the device against itself in float64 on a CPU."""
    del dtype
    width, heads, chunk = sizes["d_model"], sizes["num_heads"], sizes["chunk_tokens"]
    peer = titans_layers(width, heads, chunk)[1]()
    x = torch.randn(1, 4 * chunk, width)
    with torch.no_grad():
        actual = peer.to(device)(x.to(device))[0]
        expected = peer.to("cpu", torch.float64)(x.double())[0]
    return relative_error([actual], [expected])


def _layer_calls(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> tuple[Call, Callable[[], Call]]:
    """Prefill of a whole layer, projections included: TTT-Linear's and multi-head attention's."""
    batch, tokens, width, heads = sizes_of(sizes, "batch_size", "num_tokens", "d_model", "num_heads")
    x = torch.randn(batch, tokens, width, device=device, dtype=dtype)

    def call_of(target: str, **options: Any) -> Call:
        layer = instantiate({"_target_": target, "d_model": width, "num_heads": heads, **options})
        layer = layer.to(device, dtype).eval()

        def call() -> object:
            with torch.no_grad():
                return layer.prefill(x, layer.init_state(batch, tokens))[0]

        return call

    ours = call_of("archs.ttt.TTTLinear", implementation="triton")
    return ours, lambda: call_of("archs.attention.Attention")


TITANS_SIZES = ("batch_size", "num_tokens", "d_model", "num_heads", "chunk_tokens")
FLA_DIFFERENCE = "fla has one step size a query's token and o + LN(o) in the output; ours computes more"
TITANS_DIFFERENCE = "another update, see python -m harness.peers; alike are the shapes and the chunk's tokens"


def _lines() -> dict[str, Line]:
    ttt = {"batch_size": 16, "num_tokens": 32768, "num_heads": 32, "head_width": 64, "mini_batch_tokens": 16}
    mlp = {**ttt, "batch_size": 4, "num_tokens": 4096}
    memory = {"batch_size": 4, "num_tokens": 8192, "d_model": 512, "num_heads": 8, "head_width": 64}
    scan = {"batch_size": 4, "num_tokens": 8192, "channels": 4096, "state_width": 16}
    duality = {"batch_size": 4, "num_tokens": 8192, "num_heads": 64, "head_width": 64, "state_width": 128}
    mixing = {"batch_size": 4, "num_tokens": 16384, "num_heads": 16, "head_width": 128}
    lines: dict[str, Line] = {}

    def calls(name: str, peer: Any, is_training: bool, implementation: str = "triton") -> Any:
        return _operation_calls(name, implementation, peer, is_training=is_training)

    def error_of(name: str, implementation: str) -> Callable[[Sizes, torch.device, torch.dtype], float]:
        return lambda sizes, device, dtype: kernel_error(name, implementation, sizes, device, dtype, 1)

    for mode, is_training in (("forward", False), ("training", True)):
        lines[f"ttt_linear_{mode}"] = Line(
            kernel="ttt_linear", peer="fused_chunk_ttt_linear", package="fla", sizes=ttt, minimum_speed=1.3,
            make=calls("ttt_linear", _fla, is_training), peer_error=_fla_error, difference=FLA_DIFFERENCE,
        )  # fmt: skip
        lines[f"ttt_mlp_{mode}"] = Line(
            kernel="ttt_mlp", peer="our plain", sizes=mlp, minimum_speed=10.0 if is_training else None,
            make=calls("ttt_mlp", "plain", is_training), peer_error=error_of("ttt_mlp", "plain"),
        )  # fmt: skip
        lines[f"neural_memory_{mode}"] = Line(
            kernel="neural_memory", peer="NeuralMemory", package="titans_pytorch", minimum_speed=20.0,
            sizes={**memory, "chunk_tokens": 64}, make=_titans_calls(is_training=is_training),
            peer_error=_titans_error, peer_tolerance=1e-3, difference=TITANS_DIFFERENCE,
        )  # fmt: skip
        lines[f"selective_scan_{mode}"] = Line(
            kernel="selective_scan", peer="selective_scan_fn", package="mamba_ssm", minimum_speed=0.7,
            sizes=scan, make=calls("selective_scan", _mamba_ssm, is_training),
            peer_error=error_of("selective_scan", "mamba_ssm"),
        )  # fmt: skip
        lines[f"ssd_{mode}"] = Line(
            kernel="ssd", peer="mamba_chunk_scan_combined", package="mamba_ssm", minimum_speed=1.0,
            sizes={**duality, "chunk_tokens": 256}, make=calls("ssd", "mamba_ssm", is_training),
            peer_error=error_of("ssd", "mamba_ssm"),
        )  # fmt: skip
        backends = {
            "flash": "FLASH_ATTENTION",
            "cudnn": "CUDNN_ATTENTION",
            "efficient": "EFFICIENT_ATTENTION",
        }
        for short, backend in backends.items():
            lines[f"attention_{short}_{mode}"] = Line(
                kernel="attention", peer=f"torch {backend}", implementation="sdpa", sizes=mixing,
                minimum_speed=0.95, make=calls("attention", _sdpa_backend(backend), is_training, "sdpa"),
            )  # fmt: skip
        lines[f"attention_flash_attn_{mode}"] = Line(
            kernel="attention", peer="flash_attn_func", package="flash_attn", implementation="sdpa",
            sizes=mixing, minimum_speed=0.95, make=calls("attention", "flash_attn", is_training, "sdpa"),
            peer_error=error_of("attention", "flash_attn"),
        )  # fmt: skip
    for batch in (16, 1):
        for tokens in (2048, 8192, 32768):
            lines[f"layer_prefill_b{batch}_{tokens}"] = Line(
                kernel="ttt_linear", peer="attention's layer", make=_layer_calls,
                sizes={**ttt, "batch_size": batch, "num_tokens": tokens, "d_model": 2048},
                minimum_speed=1.0 if batch == 16 and tokens >= 8192 else None,
                difference="a layer of width 2048 with its projections: TTT-Linear's against attention's",
            )  # fmt: skip
    return lines


LINES = _lines()
