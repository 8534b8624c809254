"""The configuration as types: what every job needs, checked where it is composed. Imports no torch.

The schema's own keys are closed: an unknown key is an error. A group that belongs to plug-ins
(an architecture, a data set) may hold further keys, which its interpolations use. Nodes with a `_target_`
stay plain mappings; `harness.config.targets` checks them against the constructor they name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from harness.config.compose import unknown
from harness.config.errors import validation_sentence

T = TypeVar("T", bound=BaseModel)


def _check_file_name(name: str) -> str:
    if not re.fullmatch(r"[\w+-][\w.+-]*", name):
        raise ValueError("{key}={value} names files; use letters, digits, _, -, + and . alone.")
    return name


def _check_not_empty(items: list[Any]) -> list[Any]:
    if not items:
        raise ValueError("{key}={value} must hold at least one.")
    return items


def _check_tasks(tasks: Any) -> Any:
    if not isinstance(tasks, Mapping) or not all(isinstance(task, Mapping) for task in tasks.values()):
        raise ValueError("{key}={value} holds the tasks' settings; choose tasks with task=[NAME].")
    for name, task in tasks.items():
        if "_target_" not in task:
            raise ValueError(f"{{key}}.{name} has no _target_; choose tasks with task=[NAME].")
    return tasks


def _check_betas(betas: tuple[float, float]) -> tuple[float, float]:
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError("{key}={value} must lie between 0 and 1, 1 left out.")
    return betas


#: An int stays an int, so that records and hashes hold what was written.
Number = int | float
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
PositiveNumber = Annotated[Number, Field(gt=0)]
NotNegativeNumber = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Betas = Annotated[tuple[Number, Number], Strict(False), AfterValidator(_check_betas)]
Item = TypeVar("Item")
Several = Annotated[list[Item], AfterValidator(_check_not_empty)]
FileName = Annotated[str, AfterValidator(_check_file_name)]
Node = dict[str, Any]
Tasks = Annotated[dict[str, Node], BeforeValidator(_check_tasks)]


class Settings(BaseModel):
    """Frozen, strictly typed settings without unknown keys or numbers that are not finite.

    A validator's ValueError is a sentence; in it `{key}` and `{value}` stand for the full key and its value.
    """

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="constants"
    )

    def to_plain(self) -> dict[str, Any]:
        """Return the JSON values that the settings were made from."""
        return self.model_dump(mode="json", exclude_unset=True)


class SizeConfig(Settings):
    """A size (conf/size)."""

    name: FileName
    vocab_size: Positive
    d_model: Positive
    num_layers: Positive
    num_heads: Positive
    num_kv_heads: Positive
    window_tokens: Positive
    d_ff: NotNegative
    is_published: bool = False


class MatchRule(Settings):
    """The key of an architecture's model whose value is solved, and the step it moves in."""

    key: str
    step: Positive


class ArchConfig(Settings):
    """An architecture (conf/arch). Further keys are the architecture's own."""

    model_config = ConfigDict(extra="allow")

    name: FileName
    display_name: str
    colour: str
    is_pretrained: bool = False
    learning_rate: PositiveNumber | None
    has_short_convolution: bool | None
    model: Node
    match: MatchRule | None
    published: list[str] = []
    tasks: dict[str, Node] = {}
    post_training: Node | None = None

    @field_validator("learning_rate")
    @classmethod
    def _check_learning_rate(cls, rate: float | None, info: ValidationInfo) -> float | None:
        if (rate is None) != info.data.get("is_pretrained", False):
            raise ValueError(
                "{key}={value} must be a number, or null with is_pretrained=true, "
                "for a model that is not trained here."
            )
        return rate

    @field_validator("match")
    @classmethod
    def _check_match(cls, rule: MatchRule | None, info: ValidationInfo) -> MatchRule | None:
        model = info.data.get("model")
        if rule is not None and model is not None and rule.key not in model:
            valid = [str(key) for key in model if not str(key).startswith("_")]
            raise ValueError(unknown("{key}.key", rule.key, valid))
        return rule


class DataConfig(Settings):
    """A data set (conf/data). Further keys are the source's own."""

    model_config = ConfigDict(extra="allow")

    vocab_size: Positive
    corpus: Node


class Recipe(Settings):
    """The settings of AdamW, its schedule and its checkpoints: all of a training run but the learning rate.

    num_steps:            optimiser steps.
    warmup_fraction:      fraction of the steps in which the rate rises linearly from 0.
    final_ratio:          the last step's rate as a fraction of the peak, unless final_learning_rate is given.
    betas, weight_decay, gradient_clip: of AdamW; only matrices decay.
    validation_interval_steps: steps between validation losses; the last step always validates.
    max_skipped_steps:    a step whose loss or gradient is not finite changes nothing and is counted;
                          one more than these is a divergence.
    micro_batch_tokens:   tokens of the rows that go through the model together (at least one row); their
                          gradients add up to the batch's. None: the whole batch at once.
    checkpoint_interval_s: seconds between saves of the training state, from which an interrupted run
                          continues.
    """

    num_steps: Positive
    warmup_fraction: Fraction = 0.1
    final_ratio: Fraction = 0.1
    final_learning_rate: NotNegativeNumber | None = None
    betas: Betas = (0.9, 0.95)
    weight_decay: NotNegativeNumber = 0.1
    gradient_clip: PositiveNumber = 1.0
    validation_interval_steps: Positive = 100
    max_skipped_steps: NotNegative = 10
    micro_batch_tokens: Positive | None = None
    checkpoint_interval_s: NotNegativeNumber = 30.0


class TrainConfig(Recipe):
    """A training recipe (conf/train): a Recipe, the stream of batches and the source of the learning rate."""

    name: str
    stream: Node
    search: bool
    search_grid: list[PositiveNumber]
    by_size: Node = {}
    peak_learning_rate: PositiveNumber | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_learning_rate(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "learning_rate" in values:
            raise ValueError("{key}.learning_rate is not a setting: the rate is arch.learning_rate.")
        return values

    @model_validator(mode="after")
    def _check_search(self) -> TrainConfig:
        if self.search and not self.search_grid:
            raise ValueError(
                "{key}.search_grid=[] must hold at least one learning rate; or {key}.search=false."
            )
        return self


class SweepConfig(Settings):
    """What is no part of a job: which jobs there are.

    archs, sizes, seeds: several of each, in place of the one; None: the one.
    plan_only:           show the jobs and run none.
    """

    archs: Several[str] | None = None
    sizes: Several[str] | None = None
    seeds: Several[NotNegative] | None = None
    plan_only: bool = False


class JobConfig(SweepConfig):
    """The configuration of one job: one architecture at one size, trained with one recipe on one data set."""

    experiment_name: str
    output: str
    seed: NotNegative
    device: Literal["auto", "cpu", "cuda"]
    dtype: Literal["float32", "bfloat16"]
    num_threads: Positive | None
    num_workers: Positive | Literal["auto"]
    match: Literal["parameters", "none"]
    job_timeout_s: PositiveNumber
    retry_failed: bool
    implementation: dict[str, str]
    size: SizeConfig
    arch: ArchConfig
    reference: ArchConfig
    data: DataConfig
    train: TrainConfig
    tasks: Tasks
    launcher: Node = {}  # where jobs run, which is no part of a job

    @model_validator(mode="after")
    def _check_rates(self) -> JobConfig:
        final = self.train.final_learning_rate
        for rate in self.learning_rates:
            if final is not None and final > rate:
                raise ValueError(
                    f"train.final_learning_rate={final} must lie between 0 and the peak, {rate}."
                )
        return self

    @model_validator(mode="after")
    def _check_vocabulary(self) -> JobConfig:
        num_tokens = self.data.vocab_size
        num_rows = self.arch.model.get("vocab_size", num_tokens)
        if isinstance(num_rows, int) and num_tokens > num_rows:
            raise ValueError(
                f"data.vocab_size={num_tokens} is more than the {num_rows} tokens of arch={self.arch.name} "
                f"at size={self.size.name}; choose another."
            )
        return self

    @property
    def peak_learning_rate(self) -> float | None:
        """The learning rate to train at without a search: the recipe's, where it has one, else the
        architecture's. None for a model that is not trained here."""
        rate = self.train.peak_learning_rate
        return self.arch.learning_rate if rate is None else rate

    @property
    def learning_rates(self) -> list[float]:
        """The rates to train at: those of the search, or the only one; none for a model not trained here."""
        if self.arch.is_pretrained:
            return []
        if self.train.search:
            return self.train.search_grid
        return [] if self.peak_learning_rate is None else [self.peak_learning_rate]


def parse_job(values: Mapping[str, Any]) -> JobConfig:
    """Return the typed configuration of a job from its resolved, plain values.

    Raises ValueError with one sentence that names the mistake and the valid choices."""
    return parse(JobConfig, values)


def parse(kind: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Return `values` as settings of `kind`. `path` is their full key.

    Raises ValueError with one sentence for the first mistake."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise ValueError(validation_sentence(error, kind, values, path)) from None
