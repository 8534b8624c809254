"""Decode from graphs: a stand-in that runs the captured call again, with the host's numbers of its capture,
gives what plain steps give. The real capture is tested where there is a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from archs.base import SequenceModel, clone_state, state_tensors
from archs.decode_graph import NUM_WARM_UPS, CudaCapture, DecodeGraphs, with_num_tokens
from archs.implementations import resolve_implementations
from archs.ops.operation import Operation

BATCH = 2
#: Steps cross mini-batches, chunks, segments and windows of the nano sizes, and graphs are used again.
NUM_PROMPT_TOKENS, NUM_STEPS = 13, 36
ROOM = NUM_PROMPT_TOKENS + NUM_STEPS


def repeated(call: Callable[[], None]) -> Callable[[], None]:
    """The stand-in for a capture."""
    for _ in range(NUM_WARM_UPS):
        call()
    return call


def prefilled(model: SequenceModel, tokens: Tensor) -> Any:
    with torch.no_grad():
        return model.prefill(tokens[:, :NUM_PROMPT_TOKENS], model.init_state(BATCH, ROOM))[1]


def tokens_of(model: SequenceModel) -> Tensor:
    return torch.randint(0, model.vocab_size, (BATCH, ROOM), generator=torch.Generator().manual_seed(3))


def check(
    model: SequenceModel,
    tokens: Tensor,
    state: Any,
    graphs: DecodeGraphs,
    tolerance: float,
    num_steps: int = NUM_STEPS,
) -> None:
    """Every step's logits and the state after them, against plain decode."""
    buffers = list(state_tensors(graphs.state))
    addresses = [buffer.data_ptr() for buffer in buffers]
    graphs.load(state)
    with torch.no_grad():
        for step in range(NUM_PROMPT_TOKENS, NUM_PROMPT_TOKENS + num_steps):
            expected, state = model.decode(tokens[:, step], state)
            torch.testing.assert_close(graphs.step(tokens[:, step]), expected, rtol=0, atol=tolerance)
    assert [buffer.data_ptr() for buffer in buffers] == addresses
    for buffer, tensor in zip(buffers, state_tensors(state), strict=True):
        torch.testing.assert_close(buffer, tensor, rtol=0, atol=tolerance)


def is_foreign(model: SequenceModel) -> bool:
    return type(model).__module__ == "archs.pretrained.transformers_model"


def test_replayed_steps_are_the_models_steps(model: SequenceModel) -> None:
    tokens = tokens_of(model)
    state = prefilled(model, tokens)
    if is_foreign(model):
        with pytest.raises(NotImplementedError, match="does not say which of its decode steps"):
            DecodeGraphs(model, state, ROOM, repeated)
        return
    graphs = DecodeGraphs(model, clone_state(state), ROOM, repeated)
    graphs.prepare(NUM_PROMPT_TOKENS, NUM_STEPS)
    assert graphs.num_graphs <= 18, "kinds come again"
    check(model, tokens, clone_state(state), graphs, 1e-9)
    check(model, tokens, state, graphs, 1e-9, 4)  # from the start again, over what the first left behind


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_are_the_models_steps(model: SequenceModel) -> None:
    if is_foreign(model):
        pytest.skip("has no graphs")
    device = torch.device("cuda")
    model = copy.deepcopy(model).to(device)
    tokens = tokens_of(model).to(device)
    state = prefilled(model, tokens)
    graphs = DecodeGraphs(model, clone_state(state), ROOM, CudaCapture(device))
    graphs.prepare(NUM_PROMPT_TOKENS, NUM_STEPS)
    check(model, tokens, state, graphs, 1e-9)


class OneDevice(TorchDispatchMode):
    """Nothing is asked of the device, and nothing comes to it from the host: a capture would end there."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = function.name()
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"), name
        result = function(*args, **(kwargs or {}))
        for tensor in state_tensors((*args, result)):
            assert tensor.is_meta, f"{name} touches {tensor.device}"
        return result


def test_a_step_stays_on_its_device(model: SequenceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without content, whose values nobody can ask for."""
    if is_foreign(model):
        pytest.skip("has no graphs")
    resolve_implementations(model, torch.device("cpu"))
    monkeypatch.setattr(Operation, "why_unavailable", lambda self, name, device: None)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know this device
    empty, device = copy.deepcopy(model).to("meta"), torch.device("meta")
    state = empty.init_state(BATCH, ROOM)
    token, position = (torch.zeros(n, dtype=torch.int64, device=device) for n in (BATCH, 1))
    kinds = {empty.step_kind(num_tokens): num_tokens for num_tokens in range(32, 15, -1)}
    for num_tokens in kinds.values():
        with OneDevice(), torch.no_grad():
            empty.decode_at(token, with_num_tokens(state, num_tokens), position)
