"""All that Transformer² learns on top of its base: experts, dispatch, few-shot mixtures, and LoRA to compare
with (Sun, Cetin and Tang 2025, arXiv 2501.06252, section 3)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from archs.base import PostTraining, Progress, Sampler
from archs.transformer_squared.dispatch_training import (
    DispatchTraining,
    FewShot,
    dispatch_accuracy,
    few_shot_mixture,
    train_classification_expert,
    train_classifier,
)
from archs.transformer_squared.model import TransformerSquared
from archs.transformer_squared.policies import LowRankPolicy
from archs.transformer_squared.training import (
    ExpertHistory,
    FineTuning,
    Method,
    Reinforce,
    Tuning,
    batch_of,
    train_experts,
)

#: The strategies of the first pass that score domains, and so can be right or wrong.
SCORING_STRATEGIES = ("classifier", "prompt", "classification_expert")


@dataclass(frozen=True, kw_only=True)
class LoRATuning:
    """The training of LoRA adapters: that of the experts by `method`, except for what is given here."""

    method: Method
    num_steps: int | None = None
    learning_rate: float | None = None
    gradient_clip: float | None = None
    evaluate_every: int | None = None
    num_validation_batches: int | None = None

    def of(self, experts: Tuning) -> Tuning:
        """Return the experts' settings with these in their place. Raises ValueError as `Tuning`."""
        given = {name: value for name, value in vars(self).items() if name != "method" and value is not None}
        return dataclasses.replace(experts, **given)


class ExpertTraining(PostTraining):
    """Trains experts by `method`, with the settings under its name, and what dispatches them.

    prompts:   called with split, domain and seed, returns a domain's sampler.
    lora:      of the adapters that are trained beside the experts, on the same prompts.
    dispatch:  of the first pass, on the experts' training prompts.
    few_shot:  of the search for a mixture per domain, on validation prompts that chose no expert.
    Raises ValueError where a group of settings is missing or out of range.
    """

    def __init__(
        self,
        *,
        method: Method,
        prompts: Callable[..., Sampler],
        reinforce: Reinforce,
        fine_tuning: FineTuning,
        lora: LoRATuning,
        dispatch: DispatchTraining,
        few_shot: FewShot,
    ) -> None:
        groups: dict[str, tuple[Any, type]] = {
            "reinforce": (reinforce, Reinforce),
            "fine_tuning": (fine_tuning, FineTuning),
            "lora": (lora, LoRATuning),
            "dispatch": (dispatch, DispatchTraining),
            "few_shot": (few_shot, FewShot),
        }
        for name, (value, settings_type) in groups.items():
            if not isinstance(value, settings_type):
                shown = "null" if value is None else repr(value)
                raise ValueError(
                    f"{name}={shown} must be a mapping with _target_: {settings_type.__module__}."
                    f"{settings_type.__name__}"
                )
        if not callable(prompts):
            raise ValueError("prompts must be a mapping with a _target_ and _partial_: true")
        tunings: dict[str, Tuning] = {"reinforce": reinforce, "fine_tuning": fine_tuning}
        self.prompts = prompts
        self.method, self.lora_method = method, lora.method
        self.expert_tuning = tunings[method]
        try:
            self.lora_tuning = lora.of(tunings[lora.method])
        except ValueError as error:
            raise ValueError(f"lora.{error}") from None
        self.dispatch, self.few_shot = dispatch, few_shot

    def description(self, model: TransformerSquared) -> str:
        """See PostTraining: how the LoRA adapters are placed."""
        return model.lora.description

    def train(
        self,
        model: TransformerSquared,
        training: Mapping[str, Sampler],
        validation: Mapping[str, Sampler],
        *,
        seed: int,
        progress: Progress,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """See PostTraining. Leaves the base as it is."""
        started = time.perf_counter()
        with progress("experts", self.expert_tuning.num_steps * len(model.domains)) as bar:
            histories = train_experts(
                model,
                training,
                validation,
                settings=self.expert_tuning,
                seed=seed,
                on_step=lambda domain, step: bar.update(),
            )
        accuracies = self._train_dispatch(model, training, validation, progress)
        mixtures = self._search_mixtures(model, validation, seed)
        expert_seconds = time.perf_counter() - started
        started = time.perf_counter()
        with progress("LoRA", self.lora_tuning.num_steps * len(model.domains)) as bar:
            lora_histories = train_experts(
                model,
                training,
                validation,
                settings=self.lora_tuning,
                policy_type=LowRankPolicy,
                seed=seed,
                on_step=lambda domain, step: bar.update(),
            )
        details = {
            "expert_method": self.method,
            "experts": {domain: _history(history) for domain, history in histories.items()},
            "lora_method": self.lora_method,
            "lora": {domain: _history(history) for domain, history in lora_histories.items()},
            "lora_placement": model.lora.description,
            "classifier_accuracy": accuracies["classifier"],
            "dispatch_accuracy": accuracies,
            "few_shot": mixtures,
        }
        metrics = {
            "expert_train_seconds": expert_seconds,
            "lora_train_seconds": time.perf_counter() - started,
            "expert_tokens": sum(history.num_tokens for history in histories.values()),
            "num_expert_parameters": model.experts.shape[1],
            "num_lora_parameters": model.lora.num_parameters_each,
        }
        return details, metrics

    def _train_dispatch(
        self,
        model: TransformerSquared,
        training: Mapping[str, Sampler],
        validation: Mapping[str, Sampler],
        progress: Progress,
    ) -> dict[str, float]:
        """Train the first pass; return how often each strategy finds the domain of a validation prompt."""
        settings = self.dispatch
        train_classifier(model, training, num_batches=settings.num_classifier_batches)
        with progress("classification expert", settings.num_expert_steps) as bar:
            train_classification_expert(
                model,
                training,
                num_steps=settings.num_expert_steps,
                learning_rate=settings.expert_learning_rate,
                on_step=bar.update,
            )
        return {
            strategy: dispatch_accuracy(
                model, validation, strategy=strategy, num_batches=settings.num_validation_batches
            )
            for strategy in SCORING_STRATEGIES
        }

    def _search_mixtures(
        self, model: TransformerSquared, validation: Mapping[str, Sampler], seed: int
    ) -> dict[str, Any]:
        """Search a mixture for every domain and put it into the model."""
        settings, found = self.few_shot, {}
        for index, (domain, sampler) in enumerate(validation.items()):
            started, step = time.perf_counter(), self.expert_tuning.num_validation_batches
            prompts, answers = batch_of(model, sampler, step)
            max_rows = len(prompts)
            while len(prompts) < settings.num_shots:
                step += 1
                more = batch_of(model, sampler, step)
                prompts, answers = torch.cat((prompts, more[0])), torch.cat((answers, more[1]))
            shots = prompts[: settings.num_shots], answers[: settings.num_shots]
            mixture = few_shot_mixture(model, *shots, settings, max_rows=max_rows, seed=seed + index)
            model.dispatcher.mixtures[model.domains.index(domain)] = mixture.to(model.dispatcher.mixtures)
            found[domain] = {
                "mixture": dict(zip(model.domains, mixture.tolist(), strict=True)),
                "seconds": time.perf_counter() - started,
            }
        return found


def _history(history: ExpertHistory) -> dict[str, Any]:
    return {
        "reward_before": history.reward_before,
        "reward_after": history.reward_after,
        "best_step": history.best_step,
        "validation_rewards": history.validation_rewards,
        "sampled_rewards": history.sampled_rewards,
    }
