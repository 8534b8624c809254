"""Whether arch.expert_training can be used, said in one sentence before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from archs.transformer_squared.dispatch_training import DispatchTraining, FewShot
from archs.transformer_squared.training import METHODS, Method
from harness.config.compose import unknown
from harness.config.targets import check_call, check_targets, check_values

PATH = "arch.expert_training"
KEYS = ("method", "prompts", *METHODS, "lora", "dispatch", "few_shot")
HINTS: dict[str, Any] = {key: Method if key == "method" else dict[str, Any] for key in KEYS}


def check_experts(arch: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
    """arch and reference as in the configuration. Raises ValueError with one sentence that names the
    mistake and the valid choices."""
    experts, rate, base_rate = arch["expert_training"], arch["learning_rate"], reference["learning_rate"]
    if rate != base_rate:
        raise ValueError(
            f"arch.learning_rate={rate} of arch={arch['name']} is its base's, {base_rate}: "
            "choose the base with arch@reference and its rate with reference.learning_rate."
        )
    for key in experts:
        if key not in KEYS:
            raise ValueError(unknown(f"key of {PATH}", key, KEYS))
    missing = [key for key in KEYS if key not in experts]
    if missing:
        raise ValueError(f"{PATH} lacks {', '.join(missing)}.")
    check_values(experts, HINTS, PATH)
    if "method" not in experts["lora"]:
        raise ValueError(f"{PATH}.lora lacks method.")
    check_values(experts["lora"], {"method": Method}, f"{PATH}.lora")
    if "_target_" not in experts["prompts"]:
        raise ValueError(f"{PATH}.prompts lacks _target_.")
    check_targets({**experts["prompts"], "_partial_": True}, f"{PATH}.prompts")
    lora = {key: value for key, value in experts["lora"].items() if key != "method"}
    lora_method = experts["lora"]["method"]
    groups: list[tuple[str, type, Mapping[str, Any]]] = [
        *((f"{PATH}.{name}", settings_type, experts[name]) for name, settings_type in METHODS.items()),
        (f"{PATH}.lora", METHODS[lora_method], {**experts[lora_method], **lora}),
        (f"{PATH}.dispatch", DispatchTraining, experts["dispatch"]),
        (f"{PATH}.few_shot", FewShot, experts["few_shot"]),
    ]
    for path, settings_type, values in groups:
        check_call(settings_type, values, path, f"{settings_type.__module__}.{settings_type.__name__}")
        try:
            settings_type(**values)
        except ValueError as error:
            raise ValueError(f"{path}.{error}.") from None
