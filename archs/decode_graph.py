"""Decode steps replayed from CUDA graphs: buffers that stay where they are, and one graph a kind of step.

A graph repeats kernels on fixed addresses with the numbers that the host knew at its capture. So token,
position and state lie in buffers; a step that makes tensors of its own is followed, in the graph, by their
copy into the buffers; and steps that do other work (the last token of a mini-batch) have a graph of their
own, chosen by `SequenceModel.step_kind` from the number of tokens, which the host knows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from archs.base import SequenceModel, State, state_tensors

#: Captures a call: returns what runs it again.
Capture = Callable[[Callable[[], None]], Callable[[], None]]

#: Calls before a capture, in which kernels are compiled, tuned and given their workspaces.
NUM_WARM_UPS = 3


def can_capture(device: torch.device) -> bool:
    """Return whether a device has graphs."""
    return device.type == "cuda"


class CudaCapture:
    """Captures calls as CUDA graphs that share one pool of memory, since they run in turn and none leaves
    a result in it."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, call: Callable[[], None]) -> Callable[[], None]:
        """Warm `call` up on a side stream, capture it, and return a function that replays it."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(NUM_WARM_UPS):
                    call()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                call()
        return graph.replay


class DecodeGraphs:
    """A model's decode as graphs, on buffers of one batch size and room.

    state:              its tensors become the buffers; nobody else may use them.
    max_context_tokens: the room that `state` was made for.
    capture:            of a call, `CudaCapture` on a GPU.

    `prepare`, then `load`, then `step` as often as was prepared. Raises NotImplementedError with one
    sentence where the model's steps cannot be held in graphs.
    """

    def __init__(self, model: SequenceModel, state: State, max_context_tokens: int, capture: Capture) -> None:
        model.step_kind(0)
        first, *_ = self._buffers = list(state_tensors(state))
        self.state, self.num_tokens, self._room = state, state.num_tokens, max_context_tokens
        self._model, self._capture = model, capture
        device = first.device
        self._token = torch.zeros(first.shape[0], dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._logits: Tensor | None = None
        self._replays: dict[Hashable, Callable[[], None]] = {}

    @property
    def num_graphs(self) -> int:
        """Return the number of kinds of steps that were captured."""
        return len(self._replays)

    @torch.no_grad()
    def prepare(self, num_tokens: int, num_steps: int) -> None:
        """Capture every kind among `num_steps` steps after `num_tokens` tokens. The buffers hold rubbish
        afterwards. Raises ValueError where there is no room for them."""
        self._check_room(num_tokens + num_steps)
        for position in range(num_tokens, num_tokens + num_steps):
            kind = self._model.step_kind(position)
            if kind not in self._replays:
                self._position.fill_(position)
                state = with_num_tokens(self.state, position)
                self._replays[kind] = self._capture(lambda state=state: self._step(state))

    def load(self, state: State) -> State:
        """Copy a state of the same shapes into the buffers; the next step continues it. Return it as it
        lies there."""
        for buffer, tensor in zip(self._buffers, state_tensors(state), strict=True):
            buffer.copy_(tensor)
        self.num_tokens = state.num_tokens
        return with_num_tokens(self.state, self.num_tokens)

    def step(self, token: Tensor) -> Tensor:
        """token (B,) -> logits (B, V), a buffer that the next step overwrites. KeyError for a kind of step
        that was not prepared, ValueError where the room is used up."""
        self._check_room(self.num_tokens + 1)
        replay = self._replays[self._model.step_kind(self.num_tokens)]
        self._token.copy_(token)
        self._position.fill_(self.num_tokens)
        replay()
        self.num_tokens += 1
        assert self._logits is not None
        return self._logits

    def _step(self, state: State) -> None:
        """Run one step from the buffers and copy its results back into them; a graph holds this."""
        logits, after = self._model.decode_at(self._token, state, self._position)
        if self._logits is None:
            self._logits = torch.empty_like(logits)
        self._logits.copy_(logits)
        owned = {buffer.untyped_storage().data_ptr() for buffer in self._buffers}
        moved = []
        for buffer, result in zip(self._buffers, state_tensors(after), strict=True):
            if buffer.shape != result.shape:
                raise NotImplementedError(
                    f"a decode step of {type(self._model).__name__} turns a state of shape "
                    f"{tuple(buffer.shape)} into {tuple(result.shape)}, so no CUDA graph can hold it."
                )
            if not _is_same(buffer, result):  # one that lies in another buffer is saved before that is filled
                is_owned = result.untyped_storage().data_ptr() in owned
                moved.append((buffer, result.clone() if is_owned else result))
        for buffer, result in moved:
            buffer.copy_(result)

    def _check_room(self, num_tokens: int) -> None:
        if num_tokens > self._room:
            raise ValueError(
                f"the state has room for {self._room} tokens and was given {num_tokens}; "
                "ask init_state for a larger max_context_tokens"
            )


def with_num_tokens(state: Any, num_tokens: int) -> Any:
    """Return the state on the same tensors, with `num_tokens` in it and in every state inside it."""
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        items = {field: with_num_tokens(getattr(state, field), num_tokens) for field in state._fields}
        return type(state)(**(items | ({"num_tokens": num_tokens} if "num_tokens" in items else {})))
    if isinstance(state, tuple):
        return tuple(with_num_tokens(item, num_tokens) for item in state)
    return state


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride()
