"""Declarations of the tasks whose records have schema version 1, which stood in no header.

Standard library only.
"""

from __future__ import annotations

from harness.record.metrics import Direction, Kind, Metric


def _metric(
    name: str,
    label: str,
    unit: str = "",
    direction: Direction = "neither",
    kind: Kind = "quality",
    *,
    interval: bool = False,
    tolerance: float | None = None,
    is_compared_on_mean: bool = False,
    is_headline: bool = False,
) -> Metric:
    low, high = (f"{name}_low", f"{name}_high") if interval else (None, None)
    return Metric(
        name=name,
        label=label,
        unit=unit,
        direction=direction,
        kind=kind,
        low=low,
        high=high,
        tolerance=tolerance,
        is_compared_on_mean=is_compared_on_mean,
        is_headline=is_headline,
    )


_TIMES = (
    Metric(
        name="median_ms",
        label="median",
        unit="ms",
        direction="lower",
        kind="cost",
        low="p10_ms",
        high="p90_ms",
        is_headline=True,
    ),
    _metric("p10_ms", "10th percentile", "ms", kind="cost"),
    _metric("p90_ms", "90th percentile", "ms", kind="cost"),
    _metric("tokens_per_s", "throughput", "tokens/s", "higher", "cost"),
    _metric("first_call_ms", "first call", "ms", "lower", "cost"),
    _metric("peak_memory_bytes", "peak memory", "bytes", "lower", "cost"),
)

#: task -> its metrics.
METRICS: dict[str, tuple[Metric, ...]] = {
    "train": (
        _metric(
            "final_validation_bits_per_byte",
            "final validation loss",
            "bits/byte",
            "lower",
            "training",
            tolerance=0.05,
            is_headline=True,
        ),
        _metric("final_validation_loss_nats", "final validation loss", "nats", "lower", "training"),
        _metric("num_parameters", "parameters", kind="training"),
        _metric("trained_tokens", "trained tokens", "tokens", kind="training"),
        _metric("train_seconds", "training time", "s", "lower", "training"),
        _metric("tokens_per_s", "throughput", "tokens/s", "higher", "training"),
        _metric("learning_rate", "learning rate", kind="training"),
        _metric("num_skipped_steps", "skipped steps", "", "lower", "training"),
        _metric("base_train_seconds", "training time of the base", "s", "lower", "training"),
        _metric("expert_train_seconds", "training time of the experts", "s", "lower", "training"),
        _metric("lora_train_seconds", "training time of LoRA", "s", "lower", "training"),
        _metric("expert_tokens", "tokens the experts learned from", "tokens", kind="training"),
        _metric("num_expert_parameters", "parameters per expert", kind="training"),
        _metric("num_lora_parameters", "parameters per LoRA adapter", kind="training"),
    ),
    "learning_rate_search": (
        _metric("mixture_loss_nats", "loss on the mixture", "nats", "lower", "training", is_headline=True),
        _metric("validation_loss_nats", "loss on text", "nats", "lower", "training"),
    ),
    "cost": (
        _metric("num_parameters", "parameters", kind="cost", tolerance=0, is_headline=True),
        # The following stand in the point's details, by context.
        _metric("state_bytes", "state", "bytes", "lower", "cost", tolerance=0),
        _metric("prefill_flops_per_token", "prefill", "FLOPs/token", "lower", "cost", tolerance=0),
        _metric("decode_flops_per_token", "decode", "FLOPs/token", "lower", "cost", tolerance=0),
        _metric("dispatch_flops_per_token", "dispatch", "FLOPs/token", "lower", "cost", tolerance=0),
    ),
    "calibration": (_metric("matmul_ms", "matrix product", "ms", "lower", "cost"),),
    "perplexity": (
        _metric(
            "bits_per_byte",
            "bits per byte",
            "bits/byte",
            "lower",
            interval=True,
            tolerance=0.05,
            is_headline=True,
        ),
        _metric("bits_per_byte_low", "low end of bits per byte", "bits/byte"),
        _metric("bits_per_byte_high", "high end of bits per byte", "bits/byte"),
        _metric("perplexity", "perplexity", "", "lower"),
        _metric("num_documents", "documents"),
        _metric("num_tokens", "tokens", "tokens"),
    ),
    "needle": (
        _metric("accuracy", "accuracy", "share", "higher", interval=True, is_headline=True),
        _metric("accuracy_low", "low end of accuracy", "share"),
        _metric("accuracy_high", "high end of accuracy", "share"),
        _metric("num_examples", "examples"),
        _metric(
            "answer_log_probability_nats",
            "log-probability",
            "nats",
            "higher",
            tolerance=0.3,
            is_compared_on_mean=True,
        ),
        _metric("chance_accuracy", "chance", "share"),
        _metric("achieved_depth_tokens", "depth reached", "tokens"),
        _metric("is_trained_length", "trained length"),
    ),
    "adaptation": (
        _metric("accuracy", "accuracy", "share", "higher", interval=True, is_headline=True),
        _metric("accuracy_low", "low end of accuracy", "share"),
        _metric("accuracy_high", "high end of accuracy", "share"),
        _metric("num_examples", "examples"),
        _metric("answer_probability", "probability", "share", "higher"),
        _metric("answer_log_probability_nats", "log-probability", "nats", "higher"),
        _metric("num_tuned_parameters", "tuned parameters"),
        _metric("right_domain_share", "right expert", "share", "higher"),
        _metric("first_pass_ms", "first pass", "ms", "lower", "cost"),
        _metric("second_pass_ms", "second pass", "ms", "lower", "cost"),
    ),
    "latency": (
        *_TIMES,
        _metric("state_bytes", "state", "bytes", "lower", "cost"),
        _metric("traffic_bytes", "traffic per step", "bytes", "lower", "cost"),
        _metric("copy_bytes_per_s", "copy", "bytes/s", kind="cost"),
        _metric("floor_ms", "bandwidth bound", "ms", kind="cost"),
        _metric("dispatch_ms", "dispatch", "ms", "lower", "cost"),
    ),
    "training_speed": (
        *_TIMES,
        _metric("model_flops_per_s", "model FLOP/s", "FLOP/s", "higher", "cost"),
        _metric("matmul_flops_per_s", "matrix product FLOP/s", "FLOP/s", kind="cost"),
        _metric("utilisation", "utilisation", "share", "higher", "cost"),
    ),
}
