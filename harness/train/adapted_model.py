"""An adaptive model: the base of `reference`, and what its post-training adds."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from archs.base import AdaptiveModel, PostTraining, Sampler
from harness.config.build import instantiate
from harness.config.identity import training_hash
from harness.record.metrics import Metric
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

#: The numbers that the "train" point of an adaptive model has beside TRAIN_METRICS.
ADAPTED_METRICS = (
    Metric(
        name="base_train_seconds",
        label="training time of the base",
        unit="s",
        direction="lower",
        kind="training",
    ),
    Metric(
        name="expert_train_seconds",
        label="training time of the experts",
        unit="s",
        direction="lower",
        kind="training",
    ),
    Metric(
        name="lora_train_seconds", label="training time of LoRA", unit="s", direction="lower", kind="training"
    ),
    Metric(
        name="expert_tokens",
        label="tokens the experts learned from",
        unit="tokens",
        direction="neither",
        kind="training",
    ),
    Metric(
        name="num_expert_parameters",
        label="parameters per expert",
        unit="",
        direction="neither",
        kind="training",
    ),
    Metric(
        name="num_lora_parameters",
        label="parameters per LoRA adapter",
        unit="",
        direction="neither",
        kind="training",
    ),
)


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
    settings, reference = job.config.arch.post_training, job.config.reference
    recipe = job.config.train
    rate = job.config.peak_learning_rate  # the base's; None for a pretrained base
    assert settings is not None
    post_training: PostTraining = instantiate(settings)
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
    samplers = _samplers(job, model, post_training)
    if reference.is_pretrained:
        of_base = measure_pretrained(job, model)  # untrained experts are the base
        base_details = {**of_base.details, "checkpoint": checkpoint}
    else:
        base = obtain_trained(job, reference.model)
        of_base, base_details = base.point, base.point.details
        model.load_base(base.model.state_dict())
        del base
    model.eval()
    print(f"{job.identity[0]}: {post_training.description(model)}.")
    with typed_errors():
        details, metrics = post_training.train(
            model,
            samplers["train"],
            samplers["validation"],
            seed=job.config.seed,
            progress=partial(progress_bar, job),
        )
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


def _samplers(job: JobContext, model: AdaptiveModel, post_training: PostTraining) -> Samplers:
    return {
        split: {
            domain: post_training.prompts(
                split=getattr(job.corpus, split), domain=domain, seed=job.config.seed
            )
            for domain in model.domains
        }
        for split in ("train", "validation")
    }


def _fingerprint(folder: Path) -> str:
    """Return a hash of the names, sizes and times of change of a folder's files."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return content_hash([list(entry) for entry in stats])
