"""The caches of `transformers` as tensors of a state: shapes, room from the start, and back again.

What a model keeps is found out by one token run through it (`probe`): each layer of its cache then shows
its kind and the shapes of what it holds, and a rule a kind gives the bytes at any length:

    full attention      keys and values of every token, 2 B H' T K
    sliding window      of the last window - 1 tokens, for the next one brings its own
    recurrent           convolution tails and states, of fixed size

Importing this module needs the package transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

LayerTensors = tuple[Tensor, ...]


class _FullRoom:
    """A layer that writes keys and values into room it was lent, where the original grows by copying."""

    keys: Tensor
    values: Tensor

    def lend(self, keys: Tensor, values: Tensor, num_tokens: int) -> None:
        """keys, values (B, H', slots, K), of which the first are those of `num_tokens` tokens."""
        self.room = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = keys[:, :, :num_tokens], values[:, :, :num_tokens]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (B, H', C, K); return the keys and values of all tokens so far."""
        first, stop = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, first:stop] = new
        self.keys, self.values = (room[:, :, :stop] for room in self.room)
        return self.keys, self.values


class _SlidingRoom:
    """A layer that leaves what the window still needs in room it was lent."""

    keys: Tensor
    values: Tensor

    def lend(self, keys: Tensor, values: Tensor, num_tokens: int) -> None:
        """Do as `_FullRoom.lend`; the slots are filled from the front and then hold the last tokens."""
        self.room, self.cumulative_length = (keys, values), num_tokens
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = keys[:, :, :num_tokens], values[:, :, :num_tokens]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (B, H', C, K); return the keys and values that the new tokens may see."""
        seen = super().update(key_states, value_states, *args, **kwargs)
        num_kept = self.keys.shape[2]
        for room, kept in zip(self.room, (self.keys, self.values), strict=True):
            room[:, :, :num_kept] = kept
        self.keys, self.values = (room[:, :, :num_kept] for room in self.room)
        return seen


class _Full(_FullRoom, DynamicLayer):
    pass


class _Sliding(_SlidingRoom, DynamicSlidingWindowLayer):
    pass


class _RecurrentAndFull(_FullRoom, LinearAttentionAndFullAttentionLayer):
    pass


class _RecurrentAndSliding(_SlidingRoom, LinearAttentionAndSlidingWindowAttentionLayer):
    pass


#: Kind of a cache's layer -> the same with room. Exact kinds: one derived from these may hold more.
ROOMS: dict[type, type] = {
    DynamicLayer: _Full,
    DynamicSlidingWindowLayer: _Sliding,
    LinearAttentionLayer: LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer: _RecurrentAndFull,
    LinearAttentionAndSlidingWindowAttentionLayer: _RecurrentAndSliding,
    DummyLayer: DummyLayer,
}


class Buffer(NamedTuple):
    """Shape without the batch axis, and dtype, of a fixed tensor; `index` among the layer's own."""

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class LayerLayout(NamedTuple):
    """The tensors that one layer of a cache holds.

    key_shape, value_shape: (H', K), None where it attends to nothing. window: None for full attention.
    convolutions, recurrent: the tails and states of a recurrent layer.
    """

    kind: type
    key_shape: tuple[int, int] | None
    value_shape: tuple[int, int] | None
    dtype: torch.dtype | None
    window: int | None
    convolutions: tuple[Buffer, ...]
    recurrent: tuple[Buffer, ...]

    def slots(self, context_tokens: int) -> int:
        """Return how many tokens' keys and values are kept."""
        return context_tokens if self.window is None else min(context_tokens, self.window - 1)

    def empty(self, batch_size: int, context_tokens: int, device: torch.device) -> LayerTensors:
        """Return zeros: keys, values (B, H', slots, K), then the convolutions' tails, then the states."""
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = []
        if self.key_shape is not None and self.value_shape is not None and self.dtype is not None:
            slots = self.slots(context_tokens)
            for heads, width in (self.key_shape, self.value_shape):
                shapes.append(((heads, slots, width), self.dtype))
        shapes += [(buffer.shape, buffer.dtype) for buffer in (*self.convolutions, *self.recurrent)]
        return tuple(torch.zeros(batch_size, *shape, dtype=dtype, device=device) for shape, dtype in shapes)

    def restore(self, tensors: LayerTensors, num_tokens: int) -> Any:
        """Return the cache's layer after `num_tokens` tokens; what was `empty` is left for it to begin."""
        options: dict[str, Any] = {} if self.window is None else {"sliding_window": self.window}
        if issubclass(self.kind, LinearAttentionCacheLayerMixin):
            indices = {buffer.index for buffer in (*self.convolutions, *self.recurrent)}
            options["number_of_states"] = 1 + max(indices, default=0)
        layer = self.kind(**options)
        if self.key_shape is not None:
            layer.lend(tensors[0], tensors[1], num_tokens)
            tensors = tensors[2:]
        if num_tokens:
            for place, buffer in enumerate(self.convolutions):
                layer.conv_states[buffer.index] = tensors[place]
                layer.conv_kernel_size[buffer.index] = buffer.shape[-1]
                layer.is_conv_states_initialized[buffer.index] = True
                layer.has_previous_state[buffer.index] = True
            for place, buffer in enumerate(self.recurrent, start=len(self.convolutions)):
                layer.recurrent_states[buffer.index] = tensors[place]
                layer.is_recurrent_states_initialized[buffer.index] = True
                layer.has_previous_state[buffer.index] = True
        return layer

    def collect(self, layer: Any) -> LayerTensors:
        """Return the tensors of a layer that has read something, in the order of `empty`."""
        attention = () if self.key_shape is None else layer.room
        tails = (layer.conv_states[buffer.index] for buffer in self.convolutions)
        states = (layer.recurrent_states[buffer.index] for buffer in self.recurrent)
        return (*attention, *tails, *states)


def restore(layouts: tuple[LayerLayout, ...], layers: tuple[LayerTensors, ...], num_tokens: int) -> Cache:
    """A cache of transformers over a state's tensors, which it updates in place or replaces."""
    cache = DynamicCache()
    pairs = zip(layouts, layers, strict=True)
    cache.layers = [layout.restore(tensors, num_tokens) for layout, tensors in pairs]
    return cache


def collect(layouts: tuple[LayerLayout, ...], cache: Cache) -> tuple[LayerTensors, ...]:
    """Return a state's tensors, after the model has read something."""
    return tuple(layout.collect(layer) for layout, layer in zip(layouts, cache.layers, strict=True))


def probe(config: Any, read_one_token: Callable[[Cache], object]) -> tuple[LayerLayout, ...]:
    """Return the layout of a model's cache. `read_one_token` runs one token, batch 1, through the model and
    cache.

    Raises ValueError where a layer is of a kind that no rule is known for."""
    cache = DynamicCache(config=config)
    read_one_token(cache)
    return tuple(_layout(layer, config.model_type) for layer in cache.layers)


def _layout(layer: Any, model_type: str) -> LayerLayout:
    if type(layer) not in ROOMS:
        valid = ", ".join(kind.__name__ for kind in ROOMS)
        raise ValueError(
            f"model_type={model_type!r} keeps a {type(layer).__name__}, whose size at a length is not known "
            f"here; known are {valid}"
        )
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    attends = keys is not None and values is not None
    is_recurrent = isinstance(layer, LinearAttentionCacheLayerMixin)
    return LayerLayout(
        kind=ROOMS[type(layer)],
        key_shape=(keys.shape[1], keys.shape[3]) if attends else None,
        value_shape=(values.shape[1], values.shape[3]) if attends else None,
        dtype=keys.dtype if attends else None,
        window=getattr(layer, "sliding_window", None),
        convolutions=_buffers(layer.conv_states) if is_recurrent else (),
        recurrent=_buffers(layer.recurrent_states) if is_recurrent else (),
    )


def _buffers(states: dict[int, Tensor | None]) -> tuple[Buffer, ...]:
    found = ((index, state) for index, state in states.items() if state is not None)
    return tuple(Buffer(index, tuple(state.shape[1:]), state.dtype) for index, state in found)
