"""Any causal language model of the package transformers, through its own cache: one more adapter."""

from __future__ import annotations

import inspect
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from archs.base import Flops, Phase, SequenceModel, check_prefill, check_state_request
from archs.cross_entropy import chunked_cross_entropy
from archs.ops.attention import OPERATION as ATTENTION

#: Our name of an implementation of attention -> the one in transformers.
ATTENTION_NAMES = {"plain": "eager", "sdpa": "sdpa", "flash_attn": "flash_attention_2"}

#: The arguments that models take their cache by.
CACHE_ARGUMENTS = ("past_key_values", "cache_params")


class HuggingFaceState(NamedTuple):
    """layers: for each layer of the cache its tensors, batch axis first; see
    archs.pretrained.transformers_cache."""

    layers: tuple[tuple[Tensor, ...], ...]
    num_tokens: int


class HuggingFaceModel(SequenceModel):
    """A `PreTrainedModel` of transformers behind the contract, computed by its own code.

    model:          a causal language model whose forward takes a transformers Cache.
    implementation: of its attention, by our names; transformers has no "reference".

    The state is its cache, with two differences that move no number: keys and values lie in room made at
    the start, where transformers copies them to append; and a window's keys and values lie in room of their
    own, where transformers keeps a view of the whole call's. A model with recurrent layers continues one
    token at a time, since these read several tokens at once from an empty state only: prefill in chunks is
    slow for it, whole prompts are not, and `reads_whole_prompts` says so to who times it.

    `loss` makes all logits at once, unlike the contract: heads differ (scales, caps), so the model itself
    must apply its own; it is for scoring, nothing is trained here.
    Raises ValueError where the model takes no cache or keeps one of an unknown kind.
    """

    def __init__(self, model: nn.Module, *, implementation: str = "auto") -> None:
        super().__init__()
        self.model, self.config = model.eval(), model.config.get_text_config(decoder=True)
        self.vocab_size = self.config.vocab_size
        arguments = inspect.signature(model.forward).parameters
        self._cache_argument = next((name for name in CACHE_ARGUMENTS if name in arguments), None)
        if self._cache_argument is None:
            raise ValueError(f"model_type={self.config.model_type!r} takes no cache of transformers")
        self._keeps_logits = "logits_to_keep" in arguments
        self._layouts: dict[tuple[torch.dtype, torch.device], tuple[Any, ...]] = {}
        attends = any(layout.key_shape is not None for layout in self._layout())
        self.reads_whole_prompts = any(layout.recurrent or layout.convolutions for layout in self._layout())
        self.operation = ATTENTION if attends else None
        if attends and implementation == "auto":
            implementation = "sdpa" if getattr(model, "_supports_sdpa", False) else "plain"
        self.implementation = implementation

    @property
    def implementation(self) -> str:
        """Return the name of the attention's implementation."""
        return self._implementation

    @implementation.setter
    def implementation(self, name: str) -> None:
        if self.operation is not None:
            if name not in ATTENTION_NAMES:
                valid = ", ".join(["auto", *ATTENTION_NAMES])
                raise ValueError(
                    f"implementation.attention={name} has no counterpart in transformers; use one of {valid}"
                )
            self.model.set_attn_implementation(ATTENTION_NAMES[name])
        self._implementation = name

    def forward(self, tokens: Tensor) -> Tensor:
        self._check_length(tokens.shape[1])
        return self.model(input_ids=tokens, use_cache=False).logits

    def loss(self, tokens: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        return chunked_cross_entropy(self(tokens), nn.Identity(), targets, weights)

    def init_state(self, batch_size: int, max_context_tokens: int) -> HuggingFaceState:
        check_state_request(batch_size, max_context_tokens)
        self._check_length(max_context_tokens)
        device = next(self.parameters()).device
        layers = (layout.empty(batch_size, max_context_tokens, device) for layout in self._layout())
        return HuggingFaceState(tuple(layers), 0)

    def prefill(
        self, tokens: Tensor, state: HuggingFaceState, num_logits: int = 1
    ) -> tuple[Tensor, HuggingFaceState]:
        num_tokens = tokens.shape[1]
        check_prefill(num_tokens, num_logits)
        self._check_room(state, num_tokens)
        if not state.num_tokens or num_tokens == 1 or not self.reads_whole_prompts:
            return self._read(tokens, state, num_logits)
        outputs = []
        for token in tokens.unbind(1):
            logits, state = self._read(token[:, None], state, 1)
            outputs.append(logits)
        return torch.cat(outputs, dim=1)[:, num_tokens - num_logits :], state

    def decode(self, token: Tensor, state: HuggingFaceState) -> tuple[Tensor, HuggingFaceState]:
        self._check_room(state, 1)
        logits, state = self._read(token[:, None], state, 1)
        return logits[:, 0], state

    def state_bytes_at(self, batch_size: int, context_tokens: int) -> int:
        check_state_request(batch_size, context_tokens)
        meta = torch.device("meta")
        tensors = (t for layout in self._layout() for t in layout.empty(batch_size, context_tokens, meta))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def flops(self, context_tokens: int, phase: Phase) -> Flops:
        """Count per token: 2 per weight of every linear layer and convolution, of a mixture's experts as many
        as answer a token; the head's for one position, or for all where the model cannot leave them out.
        Attention: 2 H (K + K_v) a query-key pair. A recurrent layer, an element of its state: readout 2,
        and scan 4 (decay and input's product, multiply-add), 3 more where every element has a decay of its
        own (A_log), as in Mamba: what its recurrence does, whatever form the model computes it in."""
        num_queries = context_tokens if phase == "prefill" else 1
        head = self.model.get_output_embeddings()
        num_logits = 1 if self._keeps_logits else num_queries
        total = Flops(
            matmul=num_queries * self._body_flops_per_token() + 2.0 * num_logits * head.weight.numel()
        )
        per_decay = any(name.endswith("A_log") and p.ndim == 2 for name, p in self.named_parameters())
        for layout in self._layout():
            if layout.key_shape is not None:
                window = context_tokens if layout.window is None else min(layout.window, context_tokens)
                pairs = window * (window + 1) / 2 + (context_tokens - window) * window
                width = 2.0 * self.config.num_attention_heads * (layout.key_shape[1] + layout.value_shape[1])
                total = total.plus(
                    Flops(
                        attention=width * (pairs if phase == "prefill" else window),
                        attention_square=width * num_queries * context_tokens,
                    )
                )
            elements = num_queries * sum(math.prod(buffer.shape) for buffer in layout.recurrent)
            total = total.plus(Flops(matmul=2.0 * elements, scan=(7.0 if per_decay else 4.0) * elements))
        return total

    def _body_flops_per_token(self) -> float:
        """Count the FLOPs per token of all linear layers and convolutions but the head."""
        head, share = self.model.get_output_embeddings(), _expert_share(self.config)
        total = 0.0
        for name, module in self.model.named_modules():
            is_expert = ".experts" in name
            if isinstance(module, nn.Linear | nn.Conv1d) or type(module).__name__ == "Conv1D":
                total += 2.0 * module.weight.numel() * (share if is_expert else 1.0) * (module is not head)
            elif is_expert:  # all experts' matrices in one tensor
                stacked = (p for p in module.parameters(recurse=False) if p.ndim == 3)
                total += 2.0 * share * sum(p.numel() for p in stacked)
        return total

    def _layout(self) -> tuple[Any, ...]:
        """Return the cache's layout in the parameters' dtype and on their device, found once for each."""
        from archs.pretrained.transformers_cache import probe

        parameter = next(self.parameters())
        key = parameter.dtype, parameter.device
        if key not in self._layouts:
            token = torch.zeros(1, 1, dtype=torch.long, device=parameter.device)
            with torch.no_grad():
                self._layouts[key] = probe(self.config, lambda cache: self._call(token, cache, 1))
        return self._layouts[key]

    def _call(self, tokens: Tensor, cache: Any, num_logits: int) -> Tensor:
        keep = {"logits_to_keep": num_logits} if self._keeps_logits else {}
        arguments = {self._cache_argument: cache}
        return self.model(input_ids=tokens, use_cache=True, **arguments, **keep).logits

    def _read(
        self, tokens: Tensor, state: HuggingFaceState, num_logits: int
    ) -> tuple[Tensor, HuggingFaceState]:
        from archs.pretrained.transformers_cache import collect, restore

        cache = restore(self._layout(), state.layers, state.num_tokens)
        logits = self._call(tokens, cache, max(1, num_logits))  # 0 would mean all of them
        layers = collect(self._layout(), cache)
        logits = logits[:, logits.shape[1] - num_logits :]
        return logits, HuggingFaceState(layers, state.num_tokens + tokens.shape[1])

    def _check_room(self, state: HuggingFaceState, num_tokens: int) -> None:
        stop = state.num_tokens + num_tokens
        for layout, tensors in zip(self._layout(), state.layers, strict=True):
            if layout.key_shape is not None and layout.slots(stop) > tensors[0].shape[2]:
                raise ValueError(
                    f"the state has room for {tensors[0].shape[2]} tokens and was given {stop}; "
                    "ask init_state for a larger max_context_tokens"
                )

    def _check_length(self, num_tokens: int) -> None:
        """Learned positions end somewhere; beyond them there is no model to measure."""
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit is None or num_tokens <= limit:
            return
        words = self.model.get_input_embeddings()
        for name, module in self.model.named_modules():
            is_position = "pos" in name.rpartition(".")[2] or name.endswith("wpe")
            if isinstance(module, nn.Embedding) and module is not words and is_position:
                raise NotImplementedError(
                    f"model_type={self.config.model_type!r} has learned positions for {limit} tokens, "
                    f"and {num_tokens} were asked for"
                )


def _expert_share(config: Any) -> float:
    """Return the fraction of a mixture's experts that answers a token; 1 without a mixture."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    count = next((value for value in (getattr(config, name, None) for name in names) if value), None)
    active = getattr(config, "num_experts_per_tok", None)
    return active / count if count and active else 1.0
