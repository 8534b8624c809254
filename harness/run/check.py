"""Check the jobs of a plan before the first one starts: `python -m harness.run.check`.

The classes of a configuration import torch. So this runs in a process of its own, and the parent of the jobs
stays small. It reads one JSON object from stdin and writes one on the last line of stdout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import hydra.utils

from archs.implementations import resolve_implementations
from harness.config.build import checked_job, instantiate
from harness.config.compose import register_resolvers
from harness.config.errors import sentence
from harness.config.schema import JobConfig
from harness.record.environment import choose_device
from harness.run.cost_card import meta_model
from tasks.base import TimingTask


def check(configs: Sequence[Mapping[str, Any]], *, is_local: bool) -> list[dict[str, Any]]:
    """Return what the plan must know of every configuration, see `harness.run.plan.Facts`.

    is_local: they run on this machine, so that their devices and implementations must be there.
    Raises ValueError or OSError where one cannot be used."""
    facts: dict[str, dict[str, Any]] = {}
    found = []
    for values in configs:
        kind = json.dumps({**values, "seed": None}, sort_keys=True)
        if kind not in facts:  # seeds need no check of their own
            facts[kind] = _facts(checked_job(values), is_local)
        found.append(facts[kind])
    return found


def _facts(config: JobConfig, is_local: bool) -> dict[str, Any]:
    device = choose_device(config.device) if is_local else None
    for task in (config.tasks | config.arch.tasks).values():
        instantiate(task)
    try:
        model, _ = meta_model(config)
        if device is not None:
            resolve_implementations(model, device)
    except (ValueError, OSError):
        raise
    except Exception:  # no mistake of the user's: the job will record it
        pass
    is_timing = [issubclass(hydra.utils.get_class(t["_target_"]), TimingTask) for t in config.tasks.values()]
    return {
        "is_trained": not all(is_timing) or not is_timing,
        "is_timed": any(is_timing),
        "is_on_gpu": device is not None and device.type == "cuda",
    }


def main() -> int:
    """Answer the request on stdin; a user's mistake is a sentence in the answer."""
    register_resolvers()
    try:
        answer: dict[str, Any] = {"facts": check(**json.load(sys.stdin))}
    except (ValueError, OSError) as error:
        answer = {"mistake": sentence(error)}
    print(f"\n{json.dumps(answer)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
