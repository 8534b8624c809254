"""The static cost card: `python -m harness.cost arch=mamba size=tiny`, without training.

The last line of its output is one JSON object; see harness.run.cost_card.card. With output=FOLDER a point of
the task "cost" is written into FOLDER/records.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import torch

from harness.config.build import checked_job
from harness.config.compose import compose_config, resolve
from harness.config.errors import sentence
from harness.config.match import is_published, mismatch_text
from harness.config.schema import JobConfig
from harness.record.command import CommandRecords
from harness.record.environment import describe
from harness.record.identity import counted_identity
from harness.run.cost_card import METRICS, card, meta_model


def table(name: str, values: Mapping[str, Any], mismatch: str) -> str:
    """Return the card for people. mismatch: in words, empty where there is nothing to compare with."""
    dispatch = values.get("dispatch_flops_per_token")
    heading = f"{'context':>9}  {'state bytes':>15}  {'prefill FLOPs/token':>20}  {'decode FLOPs/token':>19}"
    if dispatch is not None:
        heading += f"  {'dispatch FLOPs/token':>21}"
    lines = [
        f"{name}: {values['num_parameters']:,} parameters, {values['dtype']}, batch 1",
        mismatch,
        heading,
    ]
    for length in values["state_bytes"]:
        lines.append(
            f"{length:>9}  {values['state_bytes'][length]:>15,}  "
            f"{values['prefill_flops_per_token'][length]:>20,.0f}  "
            f"{values['decode_flops_per_token'][length]:>19,.0f}"
            + ("" if dispatch is None else f"  {dispatch[length]:>21,.0f}")
        )
    if dispatch is not None:
        lines.append(
            "Dispatch, the first pass over a prompt that chooses experts, is apart from the prefill."
        )
    return "\n".join(line for line in lines if line)


def main(overrides: list[str]) -> int:
    """Print the card of the composed configuration; 2 on a user's mistake."""
    try:
        resolved = resolve(compose_config(overrides))
        if resolved.get("arch") is None:
            raise ValueError("harness.cost needs an architecture; add arch=NAME.")
        config = checked_job(resolved)
        model, mismatch = meta_model(config)
        values = card(model, config.dtype)
        text = "" if mismatch is None else mismatch_text(mismatch, is_published=is_published(config))
        shown = table(config.arch.display_name, values, text)
    except Exception as error:
        complaint = sentence(error)
        if complaint is None:
            raise
        print(f"error: {complaint}", file=sys.stderr)
        return 2
    if any(override.startswith("output=") for override in overrides):
        _write(config, values)
    print(shown)
    print(json.dumps(values))
    return 0


def _write(config: JobConfig, values: dict[str, Any]) -> None:
    plain = config.to_plain()
    records = CommandRecords(
        config.output,
        "harness.cost",
        metrics={"cost": METRICS},
        environment=describe(torch.device("cpu")),
        config=plain,
    )
    records.write(
        "cost",
        {},
        counted_identity(plain, plain["arch"]),
        arch=config.arch.name,
        size=config.size.name,
        seed=config.seed,
        metrics={"num_parameters": values["num_parameters"]},
        details={key: value for key, value in values.items() if key != "num_parameters"},
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
