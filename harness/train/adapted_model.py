"""Transformer²: the base of `reference`, and on top of it experts, what dispatches them, and LoRA."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from archs.transformer_squared.dispatch_training import (
    DispatchTraining,
    FewShot,
    dispatch_accuracy,
    few_shot_mixture,
    train_classification_expert,
    train_classifier,
)
from archs.transformer_squared.policies import LowRankPolicy
from archs.transformer_squared.training import (
    METHODS,
    ExpertHistory,
    Sampler,
    Tuning,
    batch_of,
    train_experts,
)
from harness.config.build import instantiate
from harness.config.identity import training_hash
from harness.record.schema import content_hash
from harness.train.context import JobContext
from harness.train.errors import typed_errors
from harness.train.trained_model import (
    TrainedModel,
    TrainPoint,
    checkpoint_path,
    load_point,
    measure_pretrained,
    new_model,
    obtain_trained,
    progress_bar,
    save_point,
    trained_on,
)

Samplers = dict[str, dict[str, Sampler]]

#: The strategies of the first pass that score domains, and so can be right or wrong.
SCORING_STRATEGIES = ("classifier", "prompt", "classification_expert")


def expert_tuning(settings: dict[str, Any]) -> Tuning:
    """How the experts are trained: arch.expert_training's method with the settings under its name."""
    return METHODS[settings["method"]](**settings[settings["method"]])


def lora_tuning(settings: dict[str, Any]) -> Tuning:
    """How the LoRA adapters are trained: as the experts by the same method, but for what lora says."""
    lora = dict(settings["lora"])
    method = lora.pop("method")
    return METHODS[method](**{**settings[method], **lora})


def obtain_experts(job: JobContext, model_config: dict[str, Any]) -> TrainedModel:
    """Return the model with its experts: from its checkpoint, or trained on the base of the base's checkpoint
    (trained too if it is not there; a pretrained base is in the model already).

    Of the point's metrics the losses, trained_tokens and learning_rate are the base's. Beside them stand
    base_train_seconds (null for a pretrained base), expert_train_seconds (experts and what dispatches
    them, their looks at the validation batches too), lora_train_seconds, expert_tokens (prompts and answers
    that the experts' steps learned from) and the parameters of an expert and of a LoRA adapter.
    train_seconds is the sum of the base's and the experts' time, and tokens_per_s the tokens of both by
    that sum; null for a pretrained base. The base's own speed is details["base_tokens_per_s"].
    Raises as `harness.train.trained_model.obtain`."""
    settings, reference = job.config.arch.expert_training, job.config.reference
    recipe = job.config.train
    rate = job.config.peak_learning_rate  # the base's; None for a pretrained base
    assert settings is not None
    model: Any = new_model(job, model_config)
    checkpoint = getattr(model.base, "checkpoint", None)
    key: dict[str, Any] = {"model": model_config, "experts": settings, "base": reference.model}
    if recipe.search:
        key["base_rates"] = recipe.search_grid
    if checkpoint is not None:
        key["checkpoint"] = _fingerprint(Path(checkpoint))
    path = checkpoint_path(job, training_hash(job.config.to_plain(), key, rate, job.corpus.content_hash))
    if path.exists():
        return TrainedModel(model=model, point=load_point(job, path, model))
    samplers = _samplers(job, model.domains, settings["prompts"])
    if reference.is_pretrained:
        of_base = measure_pretrained(job, model)  # untrained experts are the base
        base_details = {**of_base.details, "checkpoint": checkpoint}
    else:
        base = obtain_trained(job, reference.model)
        of_base, base_details = base.point, base.point.details
        model.load_base(base.model.state_dict())
        del base
    model.eval()
    with typed_errors():
        details, metrics = _train(job, model, samplers, settings)
    details |= {"base": base_details, "base_tokens_per_s": of_base.metrics["tokens_per_s"]}
    base_seconds, base_tokens = (of_base.metrics[name] for name in ("train_seconds", "trained_tokens"))
    all_metrics = {
        **of_base.metrics,
        "num_parameters": model.num_parameters,
        "base_train_seconds": base_seconds,
        **metrics,
    }
    if base_seconds is not None:
        seconds = base_seconds + metrics["expert_train_seconds"]
        tokens_per_s = (base_tokens + metrics["expert_tokens"]) / seconds
        all_metrics |= {"train_seconds": seconds, "tokens_per_s": tokens_per_s}
    all_details = {**trained_on(job, model), **details}
    point = TrainPoint(metrics=all_metrics, samples=of_base.samples, details=all_details)
    save_point(path, model, point)
    return TrainedModel(model=model, point=point)


def _samplers(job: JobContext, domains: tuple[str, ...], prompts: dict[str, Any]) -> Samplers:
    make: Callable[..., Sampler] = instantiate({**prompts, "_partial_": True})
    return {
        split: {
            domain: make(split=getattr(job.corpus, split), domain=domain, seed=job.config.seed)
            for domain in domains
        }
        for split in ("train", "validation")
    }


def _train(
    job: JobContext, model: Any, samplers: Samplers, settings: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Experts, dispatch and LoRA; details and metrics of the point."""
    seed, both = job.config.seed, (samplers["train"], samplers["validation"])
    started = time.perf_counter()
    tuning = expert_tuning(settings)
    with progress_bar(job, "experts", tuning.num_steps * len(model.domains)) as bar:
        histories = train_experts(
            model, *both, settings=tuning, seed=seed, on_step=lambda domain, step: bar.update()
        )
    accuracies = _train_dispatch(job, model, samplers, DispatchTraining(**settings["dispatch"]))
    mixtures = _few_shot(job, model, samplers["validation"], tuning, FewShot(**settings["few_shot"]))
    expert_seconds = time.perf_counter() - started
    started = time.perf_counter()
    tuning = lora_tuning(settings)
    print(f"{job.identity[0]}: {model.lora.description}.")
    with progress_bar(job, "LoRA", tuning.num_steps * len(model.domains)) as bar:
        lora_histories = train_experts(
            *(model, *both),
            settings=tuning,
            policy_type=LowRankPolicy,
            seed=seed,
            on_step=lambda domain, step: bar.update(),
        )
    details = {
        "expert_method": settings["method"],
        "experts": {domain: _history(history) for domain, history in histories.items()},
        "lora_method": settings["lora"]["method"],
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
    job: JobContext, model: Any, samplers: Samplers, settings: DispatchTraining
) -> dict[str, float]:
    """Trains the first pass, and says how often each strategy finds the domain of a validation prompt."""
    train_classifier(model, samplers["train"], num_batches=settings.num_classifier_batches)
    with progress_bar(job, "classification expert", settings.num_expert_steps) as bar:
        train_classification_expert(
            model,
            samplers["train"],
            num_steps=settings.num_expert_steps,
            learning_rate=settings.expert_learning_rate,
            on_step=bar.update,
        )
    num_batches = settings.num_validation_batches
    return {
        strategy: dispatch_accuracy(model, samplers["validation"], strategy=strategy, num_batches=num_batches)
        for strategy in SCORING_STRATEGIES
    }


def _few_shot(
    job: JobContext, model: Any, validation: dict[str, Sampler], tuning: Tuning, settings: FewShot
) -> dict[str, Any]:
    """Searches a mixture for every domain on validation prompts that chose no expert, and puts it into
    the model."""
    found = {}
    for index, (domain, sampler) in enumerate(validation.items()):
        started, step = time.perf_counter(), tuning.num_validation_batches
        prompts, answers = batch_of(model, sampler, step)
        max_rows = len(prompts)
        while len(prompts) < settings.num_shots:
            step += 1
            more = batch_of(model, sampler, step)
            prompts, answers = torch.cat((prompts, more[0])), torch.cat((answers, more[1]))
        shots = prompts[: settings.num_shots], answers[: settings.num_shots]
        mixture = few_shot_mixture(model, *shots, settings, max_rows=max_rows, seed=job.config.seed + index)
        model.dispatcher.mixtures[model.domains.index(domain)] = mixture.to(model.dispatcher.mixtures)
        seconds = time.perf_counter() - started
        found[domain] = {
            "mixture": dict(zip(model.domains, mixture.tolist(), strict=True)),
            "seconds": seconds,
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


def _fingerprint(folder: Path) -> str:
    """Changes when a file of a checkpoint's folder is another: by name, bytes and time of change."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return content_hash([list(entry) for entry in stats])
