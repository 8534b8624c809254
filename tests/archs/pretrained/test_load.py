"""Published checkpoints: their numbers, their settings, and a sentence for all that does not fit."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from archs.attention import Attention
from archs.base import state_bytes
from archs.decoder import Decoder
from archs.layers import ShortConvolution
from archs.mamba import Mamba, Mamba2
from archs.pretrained.load import load_pretrained
from archs.sliding_window import SlidingWindowAttention
from archs.ttt import TTTMLP, TTTLinear

# Checkpoints of random weights, saved by the published implementations (transformers 5.23's llama, mamba and
# mamba2; ttt-lm-pytorch's ttt.py), with their tokens and float32 logits.
GOLDENS = Path(__file__).resolve().parent.parent.parent / "goldens"
NAMES = ["llama", "mamba", "mamba2", "ttt_linear", "ttt_linear_mamba_backbone", "ttt_mlp"]
NUM_TOKENS = 37

# Our name of a parameter -> the published one, tried in order.
LLAMA = [
    (r"^embedding\.", "model.embed_tokens."),
    (r"^norm\.", "model.norm."),
    (r"^head\.", "lm_head."),
    (r"^blocks\.", "model.layers."),
    (r"\.mixers\.0\.", ".self_attn."),
    (r"\.mixer_norms\.0\.", ".input_layernorm."),
    (r"\.feed_forward_norm\.", ".post_attention_layernorm."),
    (r"\.feed_forward\.", ".mlp."),
]
MAMBA = [
    (r"^embedding\.", "backbone.embeddings."),
    (r"^norm\.", "backbone.norm_f."),
    (r"^head\.", "lm_head."),
    (r"^blocks\.", "backbone.layers."),
    (r"\.mixers\.0\.", ".mixer."),
    (r"\.conv1d\.conv\.", ".conv1d."),
    (r"\.mixer_norms\.0\.", ".norm."),
]
STATE_SPACES = [(r"^embedding\.", "backbone.embedding."), *MAMBA[1:]]


def ttt_names(ttt: int) -> list[tuple[str, str]]:
    return [
        *LLAMA[:4],
        (rf"\.mixers\.{ttt}\.", ".seq_modeling_block."),
        (r"\.(conv_[qk])\.conv\.", r".\1."),
        (rf"\.mixer_norms\.{ttt}\.", ".seq_norm."),
        (r"\.mixers\.0\.conv\.conv\.", ".conv.conv."),
        (r"\.mixer_norms\.0\.", ".conv.norm."),
        (r"\.feed_forward_norm\.", ".ffn_norm."),
        (r"\.feed_forward\.", ".mlp."),
    ]


def published_tensors(model: Decoder, names: list[tuple[str, str]]) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "head.weight" and model.head.weight is model.embedding.weight:
            continue
        for old, new in names:
            name = re.sub(old, new, name)
        tensors[name] = tensor.clone()
    return tensors


def save(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def golden_tensors(name: str) -> dict[str, Tensor]:
    return load_file(GOLDENS / name / "model.safetensors")


def golden_config(name: str) -> dict[str, Any]:
    return json.loads((GOLDENS / name / "config.json").read_text())


def golden_copy(folder: Path, name: str, **changes: Any) -> Path:
    return save(folder, {**golden_config(name), **changes}, golden_tensors(name))


def tokens_for(model: Decoder, num_tokens: int = NUM_TOKENS) -> Tensor:
    return torch.randint(0, model.vocab_size, (2, num_tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def run(model: Decoder, tokens: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Logits of all positions, prefilled in chunks of `sizes` and decoded to the end."""
    state, outputs = model.init_state(*tokens.shape), []
    for size in sizes:
        chunk = tokens[:, state.num_tokens : state.num_tokens + size]
        logits, state = model.prefill(chunk, state, num_logits=size)
        outputs.append(logits)
    for token in tokens[:, state.num_tokens :].unbind(1):
        logits, state = model.decode(token, state)
        outputs.append(logits[:, None])
    assert state_bytes(state) == model.state_bytes_at(*tokens.shape)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_agrees_with_the_published_implementation(name: str) -> None:
    model = load_pretrained(GOLDENS / name)
    assert isinstance(model, Decoder) and not model.training
    expected = load_file(GOLDENS / name / "expected.safetensors")
    tokens, logits = expected["tokens"].long(), expected["logits"]
    torch.testing.assert_close(model(tokens), logits, rtol=0, atol=2e-4)
    for sizes in ((72,), (5, 17, 1, 33), (1, 63, 8), (16, 48), ()):
        torch.testing.assert_close(run(model, tokens, sizes), logits, rtol=0, atol=2e-4)


@torch.no_grad()
def test_an_active_window_agrees_with_the_published_implementation(tmp_path: Path) -> None:
    """transformers' mistral with a window of 16 on the weights of the llama above, in its own numbers: those
    of a llama up to the window, and others after it."""
    save(tmp_path, golden_config("mistral"), golden_tensors("llama"))
    model = load_pretrained(tmp_path)
    expected = load_file(GOLDENS / "mistral" / "expected.safetensors")
    tokens, logits = expected["tokens"].long(), expected["logits"]
    torch.testing.assert_close(model(tokens), logits, rtol=0, atol=2e-4)
    for sizes in ((72,), (5, 17, 1, 33), (1, 63, 8), (16, 48), ()):
        torch.testing.assert_close(run(model, tokens, sizes), logits, rtol=0, atol=2e-4)
    without = load_pretrained(GOLDENS / "llama")(tokens)
    torch.testing.assert_close(without[:, :16], logits[:, :16], rtol=0, atol=2e-4)
    assert (without[:, 16:] - logits[:, 16:]).abs().amax(dim=(0, 2)).min() > 0.01


# Every variation: the settings of config.json, and the model of ours that they describe.

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}
LLAMA_CONFIG = {**SIZES, "model_type": "llama", "intermediate_size": 40, "num_attention_heads": 4}
MAMBA_CONFIG = {**SIZES, "model_type": "mamba", "state_size": 8, "expand": 2}
MAMBA2_CONFIG = {
    **(SIZES | {"model_type": "mamba2", "state_size": 8, "expand": 2}),
    **{"num_heads": 4, "head_dim": 16, "n_groups": 1},
}
TTT_CONFIG = {**SIZES, "model_type": "ttt", "intermediate_size": 40, "num_attention_heads": 2}
SSM_CONFIG: dict[str, Any] = {"d_model": 32, "n_layer": 2, "vocab_size": 50}
ATTENTION = partial(Attention, num_heads=4)
MAMBA_LAYER = partial(Mamba, state_width=8)
MAMBA2_LAYER = partial(Mamba2, state_width=8, num_heads=4, num_norm_groups=1)
TTT_LAYER = partial(TTTLinear, num_heads=2, share_qk=False, use_gate=False)
TTT_BACKBONE = {"share_qk": True, "use_gate": True, "pre_conv": True}


@torch.no_grad()
def test_qwen2_agrees_with_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra `huggingface`")
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    published = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, **heads)).eval()
    for parameter in published.parameters():  # biases start at zero
        parameter.add_(torch.randn_like(parameter), alpha=0.2)
    published.save_pretrained(tmp_path)
    model = load_pretrained(tmp_path)
    tokens = tokens_for(model)
    expected = published(input_ids=tokens).logits
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(run(model, tokens, (5, 20)), expected, rtol=0, atol=2e-4)


def theta(value: float, spelling: str) -> dict[str, Any]:
    nested = {"rope_type": "default", "rope_theta": value}
    return {"rope_theta": value} if spelling == "rope_theta" else {spelling: nested}


CASES: dict[str, tuple[dict[str, Any], Any, dict[str, Any], list[tuple[str, str]]]] = {
    # name: (config, mixer, other settings of the Decoder, names)
    "llama": (LLAMA_CONFIG, ATTENTION, {}, LLAMA),
    "llama_tied": ({**LLAMA_CONFIG, "tie_word_embeddings": True}, ATTENTION, {"is_tied": True}, LLAMA),
    "llama_attention_bias": (
        {**LLAMA_CONFIG, "attention_bias": True},
        partial(ATTENTION, use_bias=True, use_output_bias=True),
        {},
        LLAMA,
    ),
    "llama_mlp_bias": ({**LLAMA_CONFIG, "mlp_bias": True}, ATTENTION, {"use_feed_forward_bias": True}, LLAMA),
    "llama_grouped_heads_of_another_width": (
        {**LLAMA_CONFIG, "num_key_value_heads": 2, "head_dim": 14},
        partial(ATTENTION, num_kv_heads=2, head_width=14),
        {},
        LLAMA,
    ),
    "llama_eps": ({**LLAMA_CONFIG, "rms_norm_eps": 0.01}, ATTENTION, {"norm_eps": 0.01}, LLAMA),
    **{
        f"llama_{spelling}": (
            {**LLAMA_CONFIG, **theta(500.0, spelling)},
            partial(ATTENTION, rope_theta=500.0),
            {},
            LLAMA,
        )
        for spelling in ("rope_theta", "rope_parameters", "rope_scaling")
    },
    "mistral": (
        {**LLAMA_CONFIG, "model_type": "mistral", "sliding_window": None, "num_key_value_heads": 1},
        partial(ATTENTION, num_kv_heads=1),
        {},
        LLAMA,
    ),
    "mistral_with_a_window_as_wide_as_its_context": (
        {
            **LLAMA_CONFIG,
            "model_type": "mistral",
            "num_key_value_heads": None,
            "max_position_embeddings": 4096,
        },
        ATTENTION,
        {},
        LLAMA,
    ),
    "mistral_with_a_window": (
        {
            **LLAMA_CONFIG,
            "model_type": "mistral",
            "num_key_value_heads": 2,
            "sliding_window": 8,
            "head_dim": 14,
        },
        partial(SlidingWindowAttention, num_heads=4, num_kv_heads=2, head_width=14, window_tokens=8),
        {},
        LLAMA,
    ),
    "mistral_with_the_default_window": (  # of 4096 tokens
        {
            **LLAMA_CONFIG,
            **{"model_type": "mistral", "num_key_value_heads": 4, "max_position_embeddings": 32_768},
        },
        partial(SlidingWindowAttention, num_heads=4, window_tokens=4096),
        {},
        LLAMA,
    ),
    "qwen2": (
        {**LLAMA_CONFIG, "model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False},
        partial(ATTENTION, use_bias=True),
        {},
        LLAMA,
    ),
    "mamba": (MAMBA_CONFIG, MAMBA_LAYER, {"is_tied": True, "norm_eps": 1e-5}, MAMBA),
    "mamba_untied_biased": (
        {**MAMBA_CONFIG, "tie_word_embeddings": False, "use_bias": True, "use_conv_bias": False},
        partial(MAMBA_LAYER, use_bias=True, use_conv_bias=False),
        {"norm_eps": 1e-5},
        MAMBA,
    ),
    "mamba_sizes": (
        {
            **MAMBA_CONFIG,
            **{"intermediate_size": 44, "time_step_rank": 5, "conv_kernel": 3, "layer_norm_epsilon": 1e-3},
        },
        partial(MAMBA_LAYER, inner_width=44, dt_rank=5, conv_width=3),
        {"is_tied": True, "norm_eps": 1e-3},
        MAMBA,
    ),
    "mamba_expand": (
        {**MAMBA_CONFIG, "expand": 1.5, "time_step_rank": "auto"},
        partial(MAMBA_LAYER, inner_width=48),
        {"is_tied": True, "norm_eps": 1e-5},
        MAMBA,
    ),
    "mamba2": (MAMBA2_CONFIG, MAMBA2_LAYER, {"norm_eps": 1e-5}, MAMBA),
    "mamba2_groups": (
        {**MAMBA2_CONFIG, "n_groups": 2, "chunk_size": 8, "tie_word_embeddings": True, "use_bias": True},
        partial(MAMBA2_LAYER, num_groups=2, chunk_tokens=8, use_bias=True),
        {"is_tied": True, "norm_eps": 1e-5},
        MAMBA,
    ),
    "mamba2_sizes": (
        {**MAMBA2_CONFIG, "expand": 1.5, "head_dim": 12, "conv_kernel": 3, "use_conv_bias": False},
        partial(MAMBA2_LAYER, inner_width=48, conv_width=3, use_conv_bias=False),
        {"norm_eps": 1e-5},
        MAMBA,
    ),
    "mamba2_limits": (
        {**MAMBA2_CONFIG, "time_step_limit": [0.02, 0.05], "layer_norm_epsilon": 0.01},
        partial(MAMBA2_LAYER, step_limits=(0.02, 0.05), norm_eps=0.01),
        {"norm_eps": 0.01},
        MAMBA,
    ),
    "mamba2_infinity_as_an_object": (
        {**MAMBA2_CONFIG, "time_step_limit": [0.02, {"__float__": "Infinity"}]},
        partial(MAMBA2_LAYER, step_limits=(0.02, math.inf)),
        {"norm_eps": 1e-5},
        MAMBA,
    ),
    "ttt": (TTT_CONFIG, TTT_LAYER, {"is_tied": True}, ttt_names(0)),
    "ttt_untied": (
        {**TTT_CONFIG, "tie_word_embeddings": False, "rms_norm_eps": 1e-3, **theta(500.0, "rope_parameters")},
        partial(TTT_LAYER, rope_theta=500.0),
        {"norm_eps": 1e-3},
        ttt_names(0),
    ),
    "ttt_gate_alone": (
        {**TTT_CONFIG, "use_gate": True, "mini_batch_size": 8, "ttt_base_lr": 0.3},
        partial(TTT_LAYER, use_gate=True, mini_batch_tokens=8, base_lr=0.3),
        {"is_tied": True},
        ttt_names(0),
    ),
    "ttt_mlp_backbone": (
        {**TTT_CONFIG, **TTT_BACKBONE, "ttt_layer_type": "mlp", "conv_kernel": 3, "mini_batch_size": 5},
        partial(TTTMLP, num_heads=2, conv_width=3, mini_batch_tokens=5, base_lr=1.0),
        {"is_tied": True, "pre_mixer": partial(ShortConvolution, width=3)},
        ttt_names(1),
    ),
    "state_spaces_mamba": (
        {**SSM_CONFIG, "ssm_cfg": {}, "rms_norm": True, "pad_vocab_size_multiple": 8},
        Mamba,
        {"is_tied": True, "norm_eps": 1e-5, "vocab_size": 56},
        STATE_SPACES,
    ),
    "state_spaces_mamba_settings": (
        {
            **SSM_CONFIG,
            "tie_embeddings": False,
            "pad_vocab_size_multiple": 1,
            "ssm_cfg": {"d_state": 6, "d_conv": 3, "expand": 1.5, "dt_rank": 3, "bias": True, "dt_min": 0.01},
        },
        partial(Mamba, state_width=6, conv_width=3, inner_width=48, dt_rank=3, use_bias=True),
        {"norm_eps": 1e-5},
        STATE_SPACES,
    ),
    "state_spaces_mamba2": (
        {
            **SSM_CONFIG,
            "d_intermediate": 0,
            "attn_layer_idx": [],
            "pad_vocab_size_multiple": 16,
            "ssm_cfg": {"layer": "Mamba2", "headdim": 16, "ngroups": 2, "dt_limit": [0.0, 0.05]},
        },
        partial(Mamba2, head_width=16, num_groups=2, step_limits=(0.0, 0.05)),
        {"is_tied": True, "norm_eps": 1e-5, "vocab_size": 64},
        STATE_SPACES,
    ),
}


def random_model(mixer: Any, others: dict[str, Any], d_ff: int) -> Decoder:
    """Ours, every parameter moved off its initial value so far that each setting shows."""
    torch.manual_seed(0)
    settings = {"vocab_size": 50, "d_model": 32, "num_layers": 2, "d_ff": d_ff, "is_tied": False, **others}
    model = Decoder(**settings, mixers=[mixer])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Decoder]:
    """A checkpoint folder and the model that was saved in it."""
    config, mixer, others, names = CASES[request.param]
    model = random_model(mixer, others, config.get("intermediate_size", 0) if "mlp" in str(names) else 0)
    return save(tmp_path / "checkpoint", config, published_tensors(model, names)), model


@torch.no_grad()
def test_every_setting_is_read_from_the_config(case: tuple[Path, Decoder]) -> None:
    folder, model = case
    loaded, tokens = load_pretrained(folder), tokens_for(model)
    expected = model(tokens)
    torch.testing.assert_close(loaded(tokens), expected, rtol=0, atol=1e-6)
    assert loaded.num_parameters == model.num_parameters
    assert loaded.flops(100, "prefill") == model.flops(100, "prefill")


@torch.no_grad()
def test_every_variation_keeps_the_contract(case: tuple[Path, Decoder]) -> None:
    model = load_pretrained(case[0], dtype=torch.float64)
    tokens = tokens_for(model)
    expected = model(tokens)
    for sizes in ((5, 16, 1), (), (NUM_TOKENS,)):
        torch.testing.assert_close(run(model, tokens, sizes), expected, rtol=0, atol=1e-9)
    for module in model.modules():
        if isinstance(module, (Attention, SlidingWindowAttention)):
            module.implementation = "plain"
    num_tokens = 240  # whole mini-batches and chunks, which the formulas assume
    with FlopCounterMode(display=False) as counter:
        model.prefill(tokens_for(model, num_tokens)[:1], model.init_state(1, num_tokens))
    flops = model.flops(num_tokens, "prefill")
    assert counter.get_total_flops() == pytest.approx(flops.matmul + flops.attention_square, rel=0.02)


def test_settings_of_the_config_change_the_numbers() -> None:
    """Else the cases above would prove nothing."""
    tokens, outputs = None, {}
    for name in ("llama", "llama_eps", "llama_rope_theta", "mamba2", "mamba2_limits", "ttt"):
        _, mixer, others, _ = CASES[name]
        model = random_model(mixer, others, 40 if "mamba" not in name else 0)
        tokens = tokens_for(model) if tokens is None else tokens
        with torch.no_grad():
            outputs[name] = model(tokens)
    for name, plain in (("llama_eps", "llama"), ("llama_rope_theta", "llama"), ("mamba2_limits", "mamba2")):
        assert (outputs[name] - outputs[plain]).abs().max() > 1e-3, name


# Files


def sharded(folder: Path, name: str = "llama") -> Path:
    tensors = golden_tensors(name)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(golden_config(name)))
    weight_map = {}
    for index in range(3):
        shard = f"model-{index + 1:05}-of-00003.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[index::3]}
        save_file(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index_text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index_text)
    return folder


@torch.no_grad()
def test_shards_are_one_model(tmp_path: Path) -> None:
    whole, shards = load_pretrained(GOLDENS / "llama"), load_pretrained(sharded(tmp_path / "shards"))
    assert torch.equal(whole(tokens_for(whole)), shards(tokens_for(whole)))


def test_device_and_dtype_are_as_asked(tmp_path: Path) -> None:
    model = load_pretrained(GOLDENS / "mamba", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    half = {name: tensor.half() for name, tensor in golden_tensors("mamba").items()}
    model = load_pretrained(save(tmp_path, golden_config("mamba"), half))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model = load_pretrained(GOLDENS / "mamba", device="meta")
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(ValueError, match="dtype"):
        load_pretrained(GOLDENS / "mamba", dtype=torch.int64)


def test_a_tied_head_is_one_parameter_and_may_be_saved_under_either_name(tmp_path: Path) -> None:
    tensors = golden_tensors("mamba")
    expected = load_pretrained(GOLDENS / "mamba")
    assert expected.head.weight is expected.embedding.weight
    embedding = tensors["backbone.embeddings.weight"]
    for number, saved in enumerate(({"backbone.embeddings.weight", "lm_head.weight"}, {"lm_head.weight"})):
        others = {name: t for name, t in tensors.items() if t is not embedding}
        folder = save(
            tmp_path / str(number),
            golden_config("mamba"),
            others | {name: embedding.clone() for name in saved},
        )
        assert torch.equal(load_pretrained(folder).head.weight, expected.head.weight)


def test_gains_and_rates_stay_out_of_weight_decay() -> None:
    model = load_pretrained(GOLDENS / "ttt_mlp")
    kept = [name for name, p in model.named_parameters() if getattr(p, "is_decayed", True) is False]
    fresh = random_model(partial(TTTMLP, num_heads=2, share_qk=False, use_gate=False), {}, 40)
    assert kept == [name for name, p in fresh.named_parameters() if getattr(p, "is_decayed", True) is False]
    assert kept


def test_old_tables_of_angles_are_passed_over(tmp_path: Path) -> None:
    tensors = golden_tensors("llama") | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    load_pretrained(save(tmp_path, golden_config("llama"), tensors))


# Errors: one sentence that names what is wrong


def assert_sentence(folder: Path, *parts: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_pretrained(folder)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text, text
    for part in parts:
        assert part in text, text


def test_all_that_does_not_fit_is_listed_in_one_error(tmp_path: Path) -> None:
    tensors = golden_tensors("llama")
    missing = ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"]
    for name in missing:
        del tensors[name]
    unexpected = [f"score.{index}" for index in range(7)]
    tensors |= {name: torch.zeros(1) for name in unexpected}
    tensors["model.embed_tokens.weight"] = torch.zeros(96, 63)
    tensors["model.layers.0.input_layernorm.weight"] = torch.zeros(64, dtype=torch.int8)
    assert_sentence(
        save(tmp_path, golden_config("llama"), tensors),
        *(f"missing {name}" for name in missing),
        *(f"unexpected {name}" for name in unexpected),
        "model.embed_tokens.weight has shape (96, 63) instead of (96, 64)",
        "input_layernorm.weight holds I8",
        "use the config.json that belongs to the weights",
    )


@pytest.mark.parametrize(
    ("name", "changes", "parts"),
    [
        ("llama", {"model_type": "bert"}, ["model_type='bert'", "llama, mistral, qwen2, mamba"]),
        ("llama", {"model_type": None}, ["model_type=None"]),
        ("llama", {"model_type": ["llama"]}, ["model_type=['llama']"]),
        ("llama", {"layer_types": 3}, ["layer_types=3"]),
        ("llama", {"rope_parameters": {"rope_theta": 0}}, ["rope_theta=0.0 must be positive"]),
        ("llama", {"rms_norm_eps": -1.0}, ["rms_norm_eps=-1.0"]),
        ("llama", {"rms_norm_eps": math.nan}, ["rms_norm_eps=nan"]),
        ("llama", {"vocab_size": -3}, ["vocab_size=-3"]),
        ("llama", {"hidden_size": 10**30}, ["config.json", "below 2^31"]),
        ("llama", {"hidden_act": "gelu"}, ["hidden_act='gelu'", "'silu'"]),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["rope_scaling.rope_type='yarn'"]),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling.type='linear'"]),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, ["rope_parameters.rope_type='llama3'"]),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["full_attention="]),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor=0.5"]),
        ("llama", {"rope_theta": 5.0}, ["rope_theta=5.0", "rope_parameters.rope_theta=10000.0", "disagree"]),
        ("llama", {"layer_types": ["sliding_attention", "full_attention"]}, ["layer_types=["]),
        ("llama", {"quantization_config": {"bits": 4}}, ["quantization_config={'bits': 4}"]),
        ("llama", {"hidden_size": "64"}, ["hidden_size='64'", "whole number"]),
        ("llama", {"num_attention_heads": 5, "head_dim": None}, ["num_heads=5 must divide"]),
        ("llama", {"num_key_value_heads": 3}, ["num_kv_heads=3"]),
        ("llama", {"intermediate_size": 0}, ["intermediate_size=0"]),
        ("llama", {"tie_word_embeddings": 1}, ["tie_word_embeddings=1", "true or false"]),
        ("llama", {"tie_word_embeddings": True}, ["lm_head.weight differs from model.embed_tokens.weight"]),
        ("llama", {"attention_bias": True}, ["missing model.layers.0.self_attn.q_proj.bias"]),
        ("llama", {"num_hidden_layers": 1}, ["unexpected model.layers.1."]),
        ("llama", {"model_type": "mistral", "sliding_window": 0}, ["window_tokens=0"]),
        (
            "llama",
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 64},
            ["sliding_window=64", "biases"],
        ),
        ("mamba", {"hidden_act": "relu"}, ["hidden_act='relu'"]),
        ("mamba", {"intermediate_size": 0}, ["inner_width=0"]),
        ("mamba", {"time_step_rank": "wide"}, ["time_step_rank='wide'"]),
        ("mamba2", {"num_heads": 3}, ["num_heads=3 of head_dim=32", "128"]),
        ("mamba2", {"n_groups": 3}, ["num_groups=3"]),
        ("mamba2", {"time_step_limit": [0.1]}, ["time_step_limit=[0.1]"]),
        ("mamba2", {"time_step_limit": [0.1, 0.01]}, ["step_limits=[0.1, 0.01]"]),
        ("ttt_mlp", {"ttt_layer_type": "video"}, ["ttt_layer_type='video'", "'linear' or 'mlp'"]),
        ("ttt_mlp", {"ttt_base_lr": 0}, ["base_lr=0"]),
        ("ttt_mlp", {"mini_batch_size": 8}, ["learnable_token_idx has shape (16,) instead of (8,)"]),
        ("ttt_mlp", {"ttt_layer_type": "linear"}, ["unexpected model.layers.0.seq_modeling_block.W2"]),
    ],
)
def test_a_config_that_does_not_fit_is_an_error(
    tmp_path: Path, name: str, changes: dict[str, Any], parts: list[str]
) -> None:
    assert_sentence(golden_copy(tmp_path, name, **changes), *parts)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"d_intermediate": 64}, "d_intermediate=64"),
        ({"attn_layer_idx": [1]}, "attn_layer_idx=[1]"),
        ({"rms_norm": False}, "rms_norm=False"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple=0"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg.layer='Mamba3'"),
        ({"ssm_cfg": {"d_stat": 3}}, "ssm_cfg.d_stat=3"),
        ({"ssm_cfg": {"d_state": "3"}}, "ssm_cfg.d_state='3'"),
        ({"ssm_cfg": {"headdim": 16}}, "ssm_cfg.headdim=16"),
        ({"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}, "ssm_cfg.rmsnorm=False"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 16}}, "ssm_cfg.d_ssm=16"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "ssm_cfg.norm_before_gate=True"),
    ],
)
def test_a_state_spaces_setting_that_is_not_supported_is_an_error(
    tmp_path: Path, changes: dict[str, Any], part: str
) -> None:
    assert_sentence(save(tmp_path, {**SSM_CONFIG, **changes}, {"x": torch.zeros(1)}), part)


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"]
)
def test_a_config_without_a_size_is_an_error(tmp_path: Path, key: str) -> None:
    config = golden_config("llama")
    del config[key]
    assert_sentence(save(tmp_path, config, golden_tensors("llama")), f"{key} is missing")


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", '{"a": {"__float__": "x"}}'])
def test_a_damaged_config_is_an_error(tmp_path: Path, text: str) -> None:
    golden_copy(tmp_path, "llama")
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert_sentence(tmp_path, "config.json", "fetch the checkpoint again")


def test_missing_and_damaged_files_are_errors(tmp_path: Path) -> None:
    assert_sentence(tmp_path / "nowhere", "is not a folder")
    assert_sentence(tmp_path, "holds no config.json")
    (tmp_path / "config.json").write_text(json.dumps(golden_config("llama")))
    assert_sentence(tmp_path, "holds neither model.safetensors nor model.safetensors.index.json")
    whole = (GOLDENS / "llama" / "model.safetensors").read_bytes()
    for damaged in (b"", b"not a tensor", whole[:1000], whole[:-100]):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        assert_sentence(tmp_path, "model.safetensors is damaged", "fetch the checkpoint again")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pt", "weights.pth"])
def test_a_folder_of_pickles_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(golden_config("llama")))
    torch.save(golden_tensors("llama"), tmp_path / name)
    assert_sentence(tmp_path, name, "pickles alone", "convert them to model.safetensors")


def test_damaged_shards_are_errors(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "shards")
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())

    def with_map(weight_map: Any) -> None:
        index_path.write_text(json.dumps({"weight_map": weight_map}))

    first, second = sorted(set(index["weight_map"].values()))[:2]
    with_map(index["weight_map"] | {"model.norm.weight": first, "lm_head.weight": second, "lost": second})
    assert_sentence(folder, "names tensors that are not where it says", "lost in model-00002")
    with_map(index["weight_map"] | {"more": "../elsewhere.safetensors"})
    assert_sentence(folder, "is not a file beside it")
    with_map(["model.norm.weight"])
    assert_sentence(folder, "has no weight_map")
    index_path.write_text("{")
    assert_sentence(folder, "cannot be read as JSON")
    with_map(index["weight_map"])
    (folder / second).write_bytes((folder / first).read_bytes())
    assert_sentence(folder, "is both in")
    (folder / second).write_bytes(b"x" * 100)
    assert_sentence(folder, f"{second} is damaged")
    (folder / second).unlink()
    assert_sentence(folder, f"{second} is missing")
