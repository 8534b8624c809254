"""Titans layers, ours and titans-pytorch's, on the same weights."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from harness.config.build import instantiate


def titans_layers(
    width: int, num_heads: int, chunk_tokens: int, implementation: str = "auto"
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return what builds our memory and what builds titans-pytorch's, with networks of equal shapes."""

    def ours() -> Any:
        sizes = {"d_model": width, "num_heads": num_heads, "chunk_tokens": chunk_tokens}
        network = {"memory_depth": 2, "memory_expansion": 4, "conv_width": 0}
        options = {**sizes, **network, "implementation": implementation}
        return instantiate({"_target_": "archs.titans.memory.NeuralMemory", **options}).eval()

    def peer() -> Any:
        package = importlib.import_module("titans_pytorch")
        network = package.MemoryMLP(width // num_heads, depth=2, expansion_factor=4.0)
        sizes = {"dim_head": width // num_heads, "heads": num_heads, "chunk_size": chunk_tokens}
        return package.NeuralMemory(dim=width, **sizes, model=network).eval()

    return ours, peer
