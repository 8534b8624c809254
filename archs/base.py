"""The contract every architecture keeps. Nothing here is concrete.

Axes, one glossary for the whole project:
    B batch, T tokens of a sequence, C tokens of a prefill chunk, b tokens of a mini-batch or
    memory chunk, G tokens of a segment, D model width, H heads, K head width, N state width,
    V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from archs.ops.operation import Operation

Phase = Literal["prefill", "decode"]

# A state is a NamedTuple of tensors (batch axis first), of further states, and of one host
# integer `num_tokens`. Rows of a batch have equal length.
State = Any


class Flops(NamedTuple):
    """Floating-point operations of one sequence (batch 1); a multiply-add counts as two.

    matmul:           matrix products and convolutions.
    attention:        scores and mixing of the query-key pairs that causality lets meet.
    attention_square: the same when every query met every key, which is what an operation
                      counter sees on a masked dense product. Not part of `total`.
    scan:             recurrences and other elementwise work, by the rule written beside the
                      formula.
    """

    matmul: float = 0.0
    attention: float = 0.0
    attention_square: float = 0.0
    scan: float = 0.0

    @property
    def total(self) -> float:
        """matmul + attention + scan."""
        return self.matmul + self.attention + self.scan

    def plus(self, other: Flops, times: float = 1) -> Flops:
        """Componentwise `self + times * other`."""
        return Flops(*(a + times * b for a, b in zip(self, other, strict=True)))


class Mixer(nn.Module, ABC):
    """Mixes information along the sequence: (B, C, D) -> (B, C, D), causally.

    An architecture is usually a Mixer inside `archs.decoder.Decoder`, which adds the norm in
    front of it and the residual around it. Constructors are keyword-only and take `d_model`
    first; their signature is the config schema. One that calls an operation with several
    implementations names it in `operation` and keeps the chosen name in `implementation`; one
    whose `decode_at` has a choice of its own, in `step_operation` and `step_implementation`, None
    where it is the same name.
    """

    operation: ClassVar[Operation | None] = None
    implementation: str
    step_operation: ClassVar[Operation | None] = None
    step_implementation: str | None = None

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Whole sequences from an empty context, differentiable: (B, T, D) -> (B, T, D)."""

    @abstractmethod
    def init_state(self, batch_size: int, max_context_tokens: int) -> State:
        """Return the state of an empty context, allocated on the parameters' device."""

    @abstractmethod
    def prefill(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Read the next C >= 1 tokens, (B, C, D) -> (B, C, D); consumes `state`."""

    @abstractmethod
    def decode(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Read the next token, (B, D) -> (B, D), without a host synchronisation; consumes `state`."""

    def step_kind(self, num_tokens: int) -> Hashable:
        """Return a hashable key of the decode step after `num_tokens` tokens.

        Through `decode_at`, steps with equal keys run the same operations on the same addresses, so that one
        CUDA graph serves them all. The number of keys must not grow with the context. Raises
        NotImplementedError with one sentence where a model has no such keys."""
        raise _no_kinds(self, num_tokens)

    def decode_at(self, x: Tensor, state: State, position: Tensor) -> tuple[Tensor, State]:
        """Do as `decode`, with state.num_tokens also on the device, position (1,) int64: all that differs
        between steps of one kind follows from it, and state.num_tokens may be that of another one."""
        del position
        return self.decode(x, state)

    @abstractmethod
    def state_bytes_at(self, batch_size: int, context_tokens: int) -> int:
        """By formula: the bytes of `init_state(batch_size, context_tokens)`."""

    @abstractmethod
    def flops(self, context_tokens: int, phase: Phase) -> Flops:
        """By formula. "prefill": all of `context_tokens` tokens from an empty context in one call.
        "decode": one step that becomes token number `context_tokens` (it sees that many tokens,
        itself included); work done once a chunk is spread evenly over the chunk's steps."""


#: A mixer, its next input and its state -> its output and state: `Mixer.prefill`, `decode` or `decode_at`.
Advance = Callable[[Mixer, Tensor, State], tuple[Tensor, State]]


def prefill(mixer: Mixer, x: Tensor, state: State) -> tuple[Tensor, State]:
    """Advance by `Mixer.prefill`."""
    return mixer.prefill(x, state)


def decode(mixer: Mixer, x: Tensor, state: State) -> tuple[Tensor, State]:
    """Advance by `Mixer.decode`."""
    return mixer.decode(x, state)


def decode_at(position: Tensor) -> Advance:
    """Return the Advance of `Mixer.decode_at` at a position (1,)."""
    return lambda mixer, x, state: mixer.decode_at(x, state, position)


class SequenceModel(nn.Module, ABC):
    """A language model over token ids. All shapes are in the glossary above."""

    vocab_size: int

    #: True where the state depends on `dispatch` or `select_domain`; see AdaptiveModel.
    is_adaptive: bool = False

    #: True where a prompt must come in one call of `prefill` to be read as fast as the model can: chunks
    #: would be read token by token, and a timing would measure our adapter (recurrent ones of transformers).
    reads_whole_prompts: bool = False

    @abstractmethod
    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> logits (B, T, V); differentiable, for scoring."""

    @abstractmethod
    def loss(self, tokens: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Cross-entropy in nats, the mean over targets (B, T) weighted by weights (B, T) (default
        1), as a scalar. Keeps a chunk of logits at most alive."""

    @abstractmethod
    def init_state(self, batch_size: int, max_context_tokens: int) -> State:
        """Return the state of an empty context with room for `max_context_tokens` tokens."""

    @abstractmethod
    def prefill(self, tokens: Tensor, state: State, num_logits: int = 1) -> tuple[Tensor, State]:
        """tokens (B, C), C >= 1 -> logits (B, num_logits, V) of the call's last positions.

        May be called any number of times. Consumes `state`; branching is `clone_state`.
        Raises ValueError if num_logits is negative or more than C, or if the state has no room."""

    @abstractmethod
    def decode(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """token (B,) -> logits (B, V); one step, without a host synchronisation."""

    def step_kind(self, num_tokens: int) -> Hashable:
        """Return the key of the whole model's step, as `Mixer.step_kind`."""
        raise _no_kinds(self, num_tokens)

    def decode_at(self, token: Tensor, state: State, position: Tensor) -> tuple[Tensor, State]:
        """Do as `decode`; position (1,) int64 as in `Mixer.decode_at`."""
        del position
        return self.decode(token, state)

    @abstractmethod
    def state_bytes_at(self, batch_size: int, context_tokens: int) -> int:
        """By formula: equal to `state_bytes(init_state(batch_size, context_tokens))`."""

    @abstractmethod
    def flops(self, context_tokens: int, phase: Phase) -> Flops:
        """Count as `Mixer.flops` for the whole model, with one position's logits in either phase."""

    @property
    def num_parameters(self) -> int:
        """Learned numbers, each shared one once."""
        return sum(p.numel() for p in self.parameters())

    def dispatch(self, prompt: Tensor, state: State) -> State:
        """Read the whole prompt (B, T) and fix the expert mixture in an empty `state`.
        The identity unless `is_adaptive`."""
        del prompt
        return state

    def select_domain(self, domain: str, state: State) -> State:
        """Put the expert trained for `domain` into an empty `state`, the base where there is
        none. The identity unless `is_adaptive`."""
        del domain
        return state


class AdaptiveModel(SequenceModel):
    """A base with one expert per domain, one LoRA adapter per domain to compare with, and strategies that
    choose experts for a prompt (Transformer²).

    A state has a field `mixture` (B, E): the weight of each domain's expert in each row, in the order of
    `domains`. Zeros are the base. An empty state starts there.
    """

    is_adaptive = True

    domains: tuple[str, ...]

    #: The model that the experts adapt.
    base: SequenceModel

    @abstractmethod
    def load_base(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the weights of a trained base (its state_dict) into this model."""

    @abstractmethod
    def dispatch(
        self, prompt: Tensor, state: State, strategy: str | None = None, target: str | None = None
    ) -> State:
        """Read the whole prompt (B, T) and fix the mixture in an empty `state`.

        strategy: None is the model's own. target: the domain that a strategy is told, where it is told one.
        Raises ValueError if the state is not empty, or the strategy is not known or lacks what it needs."""

    @abstractmethod
    def select_domain(self, domain: str, state: State) -> State:
        """Put the expert trained for `domain` into an empty `state`, the base where there is none."""

    @abstractmethod
    def lora_attached(self, domain: str) -> AbstractContextManager[None]:
        """Return a context within which the model computes with the LoRA adapter of `domain` added."""

    @abstractmethod
    def answer_logits(self, prompts: Tensor, answers: Tensor, mixture: Tensor | None = None) -> Tensor:
        """prompts (B, P), answers (B, A), mixture (B, E) or None for the base -> the logits (B, A, V) that
        predict the answers' tokens; differentiable."""

    @abstractmethod
    def num_tuned_parameters(self, adaptation: str) -> int:
        """Return how many learned numbers an adaptation uses beside the base: "base" none, "expert" those
        of one expert, "lora" those of one adapter, a strategy those of all experts and its own."""


#: Step number -> prompts (B, P) and right answers (B, A), the same ones whenever that step is asked for.
Sampler = Callable[[int], tuple[Tensor, Tensor]]

#: What is done and how many steps it takes -> a progress bar: a context whose value has `update()`.
Progress = Callable[[str, int], AbstractContextManager[Any]]


class PostTraining(ABC):
    """Trains what an adaptive model has on top of its base, after the base has been trained.

    An architecture names one under `post_training` in conf/arch, by _target_; its constructor is the schema.

    prompts: called with split, domain and seed, returns a domain's sampler.
    """

    prompts: Callable[..., Sampler]

    @abstractmethod
    def description(self, model: Any) -> str:
        """Return what is trained on this model, in words."""

    @abstractmethod
    def train(
        self,
        model: Any,
        training: Mapping[str, Sampler],
        validation: Mapping[str, Sampler],
        *,
        seed: int,
        progress: Progress,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Train in place on samplers by domain; return details and metrics of the record's point."""


def _no_kinds(module: nn.Module, num_tokens: int) -> NotImplementedError:
    return NotImplementedError(
        f"{type(module).__name__} does not say which of its decode steps do the same work as the one after "
        f"{num_tokens} tokens (step_kind), so no CUDA graph can hold them."
    )


def state_tensors(state: State) -> Iterator[Tensor]:
    """Yield all tensors of a state, nested states included."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, (tuple, list)):
        for item in state:
            yield from state_tensors(item)


def state_bytes(state: State) -> int:
    """Measured bytes of a state: each storage once, all of it counted."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in state_tensors(state)}
    return sum(storage.nbytes() for storage in storages.values())


def clone_state(state: State) -> State:
    """Return a deep copy, for branching: prefill and decode consume the state they are given."""
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, tuple):
        items = [clone_state(item) for item in state]
        return type(state)(*items) if hasattr(state, "_fields") else tuple(items)
    return state


def check_prefill(num_tokens: int, num_logits: int) -> None:
    """Raise ValueError where a prefill call's sizes make no sense."""
    if num_tokens < 1:
        raise ValueError(f"prefill needs at least one token, got {num_tokens}")
    if not 0 <= num_logits <= num_tokens:
        raise ValueError(
            f"num_logits={num_logits} must lie between 0 and the {num_tokens} tokens of the call"
        )


def check_state_request(batch_size: int, max_context_tokens: int) -> None:
    """Raise ValueError where a state's sizes make no sense."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be positive")
    if max_context_tokens < 1:
        raise ValueError(f"max_context_tokens={max_context_tokens} must be positive")
