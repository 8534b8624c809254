"""What makes two results the same: the identity of a point. Standard library only.

An identity has four parts, FAMILY:SUBJECT:DATA:SETTINGS.

family:   "model" for all that is measured on one trained model, else the task's name. A report never shows
          points of one family together that have different subjects.
subject:  hash of what is measured: the model, and what else its numbers depend on.
data:     content hash of corpus and tokenizer; NO_DATA where no number depends on them; UNKNOWN_DATA where a
          job ended before it had read them.
settings: hash of the task's own settings, without those that only choose its cells.

The rest of what a number depends on stands in the point: architecture, size, seed, cell. Classes are named
without their path where they are the project's own, so that a class can move to another file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

#: The folders of the project. A class in any other package is a plug-in's and keeps its whole path.
OWN_PACKAGES = ("archs", "tasks", "harness")
#: Packages of kernels that an implementation may be.
KERNEL_PACKAGES = ("triton", "mamba-ssm", "flash-attn", "causal-conv1d", "flash-linear-attention")
NO_DATA = "-"
UNKNOWN_DATA = "?"
MODEL_FAMILY = "model"

#: Settings of conf/train that do not say how one model is trained at one rate.
NOT_TRAINING_SETTINGS = (
    "name",
    "search",
    "search_grid",
    "by_size",
    "peak_learning_rate",
    "checkpoint_interval_s",
)


def content_hash(value: Any, length: int = 12) -> str:
    """Return a short hexadecimal SHA-256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def with_stable_names(value: Any) -> Any:
    """Return a configuration in which the project's own classes are named without their path."""
    if isinstance(value, Mapping):
        return {
            key: _stable_name(v) if key == "_target_" else with_stable_names(v) for key, v in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [with_stable_names(item) for item in value]
    return value


def stable_hash(value: Any) -> str:
    """Return the `content_hash` of a configuration with stable names."""
    return content_hash(with_stable_names(value))


def training_settings(train: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of conf/train that a model trained at one rate depends on."""
    return {key: value for key, value in train.items() if key not in NOT_TRAINING_SETTINGS}


def trained_identity(
    config: Mapping[str, Any], arch: Mapping[str, Any], settings: Any, *, device: str | None, data: str | None
) -> str:
    """Return the identity of what is measured on a trained model.

    config:   the job's resolved configuration. arch: the architecture's part of it.
    settings: the task's own settings, without those that only choose its cells.
    device:   "cpu" or "cuda". data: the content hash of the data, None where it is not known.
    """
    train = config.get("train") or {}
    subject = _training_subject(config, arch, device)
    subject |= {"experts": arch.get("post_training")}
    if not arch.get("is_pretrained"):
        rate = train.get("peak_learning_rate") or arch.get("learning_rate")
        subject |= {"rates": train.get("search_grid") if train.get("search") else rate}
    return _identity(MODEL_FAMILY, subject, settings, data)


def search_identity(
    config: Mapping[str, Any], arch: Mapping[str, Any], *, device: str | None, data: str | None
) -> str:
    """Return the identity of the points of a learning-rate search; the rate stands in the cell."""
    return _identity("learning_rate_search", _training_subject(config, arch, device), None, data)


def timed_identity(
    config: Mapping[str, Any],
    arch: Mapping[str, Any],
    task: str,
    settings: Any,
    *,
    environment: Mapping[str, Any],
) -> str:
    """Return the identity of what is timed on a model with random weights.

    environment: of the run, as harness.record.environment describes it.
    """
    subject = {**_model(config, arch), **machine(environment)}
    return _identity(task, subject, settings, NO_DATA)


def machine(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a time depends on besides the program: device, processor, card and CPU threads; on a GPU
    also the packages of kernels, from which `auto` chooses."""
    described = {key: environment.get(key) for key in ("device", "cpu_name", "gpu_name", "num_threads")}
    packages = environment.get("packages") or {}
    if environment.get("device") == "cuda":
        described["packages"] = {name: packages[name] for name in KERNEL_PACKAGES if name in packages}
    return described


def counted_identity(config: Mapping[str, Any], arch: Mapping[str, Any]) -> str:
    """Return the identity of the cost card, which depends on the model and its dtype alone."""
    return _identity("cost", _model(config, arch), None, NO_DATA)


def machine_identity(task: str, environment: Mapping[str, Any], settings: Any = None) -> str:
    """Return the identity of what is measured of a machine and not of an architecture."""
    return _identity(task, machine(environment), settings, NO_DATA)


def family(identity: str) -> str:
    """Return the family of an identity."""
    return identity.partition(":")[0]


def subject(identity: str) -> tuple[str, str]:
    """Return what was measured, subject and data: points with different ones are never shown together."""
    _, subject, data, _ = identity.split(":") if identity else ("", "", NO_DATA, "")
    return subject, data


def settings(identity: str) -> str:
    """Return the hash of the task's own settings."""
    return identity.rpartition(":")[2]


def is_same(identity: str, other: str) -> bool:
    """Return whether two identities are of the same result; data that are not known may be any."""
    return identity == other or (
        (family(identity), settings(identity)) == (family(other), settings(other))
        and is_same_subject(subject(identity), subject(other))
    )


def is_same_subject(one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Return whether two subjects are the same; data that are not known may be any."""
    return one[0] == other[0] and (one[1] == other[1] or UNKNOWN_DATA in (one[1], other[1]))


def _identity(family: str, subject: Any, settings: Any, data: str | None) -> str:
    settings_hash = stable_hash(settings) if settings else NO_DATA
    return ":".join((family, stable_hash(subject), UNKNOWN_DATA if data is None else data, settings_hash))


def _training_subject(
    config: Mapping[str, Any], arch: Mapping[str, Any], device: str | None
) -> dict[str, Any]:
    train = config.get("train") or {}
    is_pretrained = arch.get("is_pretrained")
    return {
        **_model(config, arch),
        "train": {"stream": train.get("stream")} if is_pretrained else training_settings(train),
        "seed": config.get("seed"),
        "device": device,
    }


def _model(config: Mapping[str, Any], arch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model after `match`, named by what decides it, so that nothing has to be built to know
    it."""
    rule, model = arch.get("match"), arch.get("model")
    reference = (config.get("reference") or {}).get("model")
    is_published = (config.get("size") or {}).get("name") in (arch.get("published") or ())
    is_matched = (
        config.get("match") != "none" and rule is not None and model != reference and not is_published
    )
    return {
        "model": model,
        "matched_to": {"rule": rule, "reference": reference} if is_matched else None,
        "dtype": config.get("dtype"),
    }


def _stable_name(target: Any) -> Any:
    if isinstance(target, str) and target.partition(".")[0] in OWN_PACKAGES:
        return target.rpartition(".")[2]
    return target
