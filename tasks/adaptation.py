"""Measure what adapting to a domain gains.

Held-out prompts of every domain are answered by the base, by the domain's expert, by its LoRA adapter, and by
the experts that the strategies of the first pass choose. The task is for an architecture with experts
(Transformer², arXiv 2501.06252, sections 3 and 4). `tasks.examples.domain` draws the prompts from the test
split. They are the same for every adaptation of a domain, so that differences can be taken prompt by prompt.

Metrics of a point (cell: domain, adaptation):
    accuracy                     share of examples whose answer greedy decoding gives exactly
    accuracy_low, accuracy_high  95% Wilson interval
    num_examples                 number of examples
    answer_probability           mean probability of the whole answer, teacher forced. This is the expected
                                 accuracy of sampling at temperature 1, which REINFORCE rewards
    answer_log_probability_nats  mean of its logarithm
    num_tuned_parameters         number of learned parameters that the adaptation uses: those of one expert or
                                 one LoRA adapter; where a strategy chooses, those of all experts and of the
                                 dispatch
    right_domain_share           mean weight that the strategy gives to the domain's own expert; null where
                                 the adaptation is given the domain
    first_pass_ms                median time of choosing the experts for one prompt; null without a first pass
    second_pass_ms               median time of reading one prompt and decoding the answer greedily, adapted.
                                 The feed-forward layers always have the factored form U S V', which base and
                                 lora do not need: the latency task has the times of the plain base
Samples, one per example: is_correct, answer_log_probability_nats. Samples of times: first_pass_ms,
second_pass_ms.

The adaptations:
    base, expert, lora     given the domain
    few_shot               the mixture that was searched on examples of the domain; given the domain, too
    prompt, classification_expert, classifier: see archs.transformer_squared.dispatch; not given the domain

The strategies prompt and classification_expert append a question to a prompt
(tasks.examples.domain_question). A base trained here has never read such text. With the default training, the
question also reaches past the trained length: the prompt has 120 tokens and the question about 80, against
128. Both are measured under that handicap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor

from archs.base import AdaptiveModel, SequenceModel, State
from archs.generate import generate, read
from harness.measure.statistics import percentile, wilson_interval
from harness.measure.time import time_call_ms
from harness.record.metrics import Metric
from tasks.base import Measurement, Task, TaskInputs, require_positive, with_interval

AdaptationName = Literal[
    "base", "expert", "lora", "prompt", "classification_expert", "classifier", "few_shot"
]
#: The adaptations that are given the domain. They have no first pass.
NEEDS_DOMAIN = ("base", "expert", "lora", "few_shot")

#: step -> prompts (B, P) and right answers (B, A).
Examples = Callable[[int], tuple[Tensor, Tensor]]


class Adaptation(Task):
    """The task of this module.

    prompts:           makes the examples; called with split, domain and seed.
    domains:           the domains of the model.
    num_prompts:       prompts per domain.
    num_timed_prompts: how many of them are run alone and timed, after one that is not timed.
    Raises ValueError where a number is not positive or there is nothing to measure.
    """

    name = "adaptation"
    METRICS = (
        *with_interval(
            Metric(
                name="accuracy",
                label="accuracy",
                unit="share",
                direction="higher",
                kind="quality",
                is_headline=True,
            )
        ),
        Metric(name="num_examples", label="examples", unit="", direction="neither", kind="quality"),
        Metric(
            name="answer_probability", label="probability", unit="share", direction="higher", kind="quality"
        ),
        Metric(
            name="answer_log_probability_nats",
            label="log-probability",
            unit="nats",
            direction="higher",
            kind="quality",
        ),
        Metric(
            name="num_tuned_parameters",
            label="tuned parameters",
            unit="",
            direction="neither",
            kind="quality",
        ),
        Metric(
            name="right_domain_share", label="right expert", unit="share", direction="higher", kind="quality"
        ),
        Metric(name="first_pass_ms", label="first pass", unit="ms", direction="lower", kind="cost"),
        Metric(name="second_pass_ms", label="second pass", unit="ms", direction="lower", kind="cost"),
    )
    CELL_SETTINGS = ("domains", "adaptations")

    def __init__(
        self,
        *,
        prompts: Callable[..., Examples],
        domains: Sequence[str],
        adaptations: Sequence[AdaptationName],
        num_prompts: int = 256,
        num_timed_prompts: int = 8,
    ) -> None:
        if not domains or not adaptations:
            raise ValueError(
                f"domains={list(domains)} and adaptations={list(adaptations)} need one name at least."
            )
        require_positive(
            "arch.tasks.adaptation", num_prompts=num_prompts, num_timed_prompts=num_timed_prompts
        )
        self.domains, self.adaptations = list(domains), list(adaptations)
        self.num_prompts, self.num_timed_prompts = num_prompts, min(num_timed_prompts, num_prompts)
        self._make = prompts

    def cells(self) -> list[dict[str, Any]]:
        return [
            {"domain": domain, "adaptation": adaptation}
            for domain in self.domains
            for adaptation in self.adaptations
        ]

    def prepare(self, inputs: TaskInputs) -> None:
        """Make the examples of every domain.

        Raises ValueError where the test split has no document of a domain that is long enough."""
        self._device = inputs.device
        self._examples = {
            domain: self._make(split=inputs.corpus.test, domain=domain, seed=inputs.seed)
            for domain in self.domains
        }

    @torch.no_grad()
    def measure(self, model: SequenceModel, cell: dict[str, Any]) -> Measurement:
        adaptive, domain, name = cast(AdaptiveModel, model), cell["domain"], cell["adaptation"]
        is_correct: list[int] = []
        log_probabilities: list[float] = []
        own_weights: list[float] = []
        with adaptive.lora_attached(domain) if name == "lora" else nullcontext():
            for prompts, answers in self._batches(domain):
                state = adaptive.init_state(len(prompts), 1)
                mixture = self._adapted(adaptive, prompts, state, domain, name).mixture
                logits = adaptive.answer_logits(prompts, answers, mixture).double()
                chosen = logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0].sum(dim=-1)
                is_correct += (logits.argmax(-1) == answers).all(dim=-1).int().tolist()
                log_probabilities += chosen.tolist()
                own_weights += mixture[:, adaptive.domains.index(domain)].tolist()
            prompts, answers = next(self._batches(domain))
            num_timed = min(self.num_timed_prompts, len(prompts))
            rows = [0, *range(num_timed)]  # the first time is a warm-up
            times = [
                self._times_ms(adaptive, prompts[row, None], answers.shape[1], domain, name) for row in rows
            ]
            first_ms, second_ms = ([both[index] for both in times[1:]] for index in (0, 1))
        low, high = wilson_interval(sum(is_correct), len(is_correct))
        has_first_pass = name not in NEEDS_DOMAIN
        metrics: dict[str, float | int | None] = {
            "accuracy": sum(is_correct) / len(is_correct),
            "accuracy_low": low,
            "accuracy_high": high,
            "num_examples": len(is_correct),
            "answer_probability": sum(map(math.exp, log_probabilities)) / len(log_probabilities),
            "answer_log_probability_nats": sum(log_probabilities) / len(log_probabilities),
            "num_tuned_parameters": adaptive.num_tuned_parameters(name),
            "right_domain_share": sum(own_weights) / len(own_weights) if has_first_pass else None,
            "first_pass_ms": percentile(first_ms, 0.5) if has_first_pass else None,
            "second_pass_ms": percentile(second_ms, 0.5),
        }
        samples: dict[str, list[Any]] = {
            "is_correct": is_correct,
            "answer_log_probability_nats": [round(value, 6) for value in log_probabilities],
            "second_pass_ms": second_ms,
        }
        if has_first_pass:
            samples["first_pass_ms"] = first_ms
        return Measurement(metrics=metrics, samples=samples)

    def _batches(self, domain: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield num_prompts prompts and answers of a domain, the same every time."""
        left, step = self.num_prompts, 0
        while left > 0:
            prompts, answers = self._examples[domain](step)
            yield prompts[:left].to(self._device), answers[:left].to(self._device)
            left, step = left - len(prompts), step + 1

    def _adapted(self, model: AdaptiveModel, prompts: Tensor, state: State, domain: str, name: str) -> State:
        """Return an empty state that holds the adaptation's mixture for the prompts."""
        if name in ("base", "lora"):
            return state
        if name == "expert":
            return model.select_domain(domain, state)
        return model.dispatch(prompts, state, strategy=name, target=domain)

    def _times_ms(
        self, model: AdaptiveModel, prompt: Tensor, num_answer_tokens: int, domain: str, name: str
    ) -> tuple[float, float]:
        """Return the times of the first pass over one prompt (1, P) and of the second."""
        states = [model.init_state(1, prompt.shape[1] + num_answer_tokens)]
        first = time_call_ms(
            lambda: states.append(self._adapted(model, prompt, states.pop(), domain, name)), self._device
        )

        def answer() -> None:
            generate(model, read(model, prompt, states.pop()), num_tokens=num_answer_tokens)

        return first, time_call_ms(answer, self._device)
