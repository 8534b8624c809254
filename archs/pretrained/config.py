"""Read a published checkpoint's config.json as the settings of a Decoder.

Settings are read, not assumed: one that decides a shape must be there, and one that a config.json may
leave out has the default of the implementation that wrote it. One that changes the numbers and has no
counterpart here is an error that names it. Sources: the configuration and modelling files of
huggingface/transformers (llama, mistral, qwen2, mamba, mamba2), test-time-training/ttt-lm-pytorch
(ttt.py) and state-spaces/mamba (mamba_ssm/models, mamba_ssm/modules).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from archs.attention import Attention
from archs.layers import ShortConvolution
from archs.mamba import Mamba, Mamba2
from archs.pretrained.settings import Settings
from archs.sliding_window import SlidingWindowAttention
from archs.ttt import TTTMLP, TTTLinear

SILU = ("silu", "swish")

# The epsilon of every norm in state-spaces' own code.
STATE_SPACES_EPS = 1e-5

# What state-spaces' ssm_cfg may hold that sets the start of training or the speed, not the function.
STATE_SPACES_NEUTRAL = (
    *("layer", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path"),
    *("A_init_range", "conv_init", "use_mem_eff_path", "sequence_parallel", "process_group"),
)

# Beginning of one of our parameters' names -> the published one; {i} is the layer. The first that fits
# is taken.
LLAMA_NAMES = {
    "embedding.": "model.embed_tokens.",
    "blocks.{i}.mixers.0.": "model.layers.{i}.self_attn.",
    "blocks.{i}.mixer_norms.0.": "model.layers.{i}.input_layernorm.",
    "blocks.{i}.feed_forward_norm.": "model.layers.{i}.post_attention_layernorm.",
    "blocks.{i}.feed_forward.": "model.layers.{i}.mlp.",
    "norm.": "model.norm.",
    "head.": "lm_head.",
}
MAMBA_NAMES = {
    "embedding.": "backbone.embeddings.",
    "blocks.{i}.mixers.0.conv1d.conv.": "backbone.layers.{i}.mixer.conv1d.",
    "blocks.{i}.mixers.0.": "backbone.layers.{i}.mixer.",
    "blocks.{i}.mixer_norms.0.": "backbone.layers.{i}.norm.",
    "norm.": "backbone.norm_f.",
    "head.": "lm_head.",
}
MAMBA_ALIASES = {"backbone.embedding.weight": "backbone.embeddings.weight"}


def _ttt_names(ttt: int) -> dict[str, str]:
    """ttt: the layer's place in its block, 1 after a `pre_conv`."""
    block = "model.layers.{i}."
    pre_conv = {
        "blocks.{i}.mixers.0.conv.conv.": block + "conv.conv.",
        "blocks.{i}.mixer_norms.0.": block + "conv.norm.",
    }
    mixer = f"blocks.{{i}}.mixers.{ttt}."
    return {
        "embedding.": "model.embed_tokens.",
        **(pre_conv if ttt else {}),
        f"{mixer}conv_q.conv.": block + "seq_modeling_block.conv_q.",
        f"{mixer}conv_k.conv.": block + "seq_modeling_block.conv_k.",
        mixer: block + "seq_modeling_block.",
        f"blocks.{{i}}.mixer_norms.{ttt}.": block + "seq_norm.",
        "blocks.{i}.feed_forward_norm.": block + "ffn_norm.",
        "blocks.{i}.feed_forward.": block + "mlp.",
        "norm.": "model.norm.",
        "head.": "lm_head.",
    }


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published model in our terms.

    decoder: keyword arguments of archs.decoder.Decoder.
    names:   beginning of our parameters' names -> the published ones.
    aliases: further published names of a tensor -> the one in `names`.
    """

    decoder: dict[str, Any]
    names: Mapping[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def name(self, ours: str) -> str:
        """Return the published name of one of our parameters."""
        parts = ours.split(".")
        layer = parts[1] if parts[0] == "blocks" else ""
        for beginning, published in self.names.items():
            beginning = beginning.replace("{i}", layer)
            if ours.startswith(beginning):
                return published.replace("{i}", layer) + ours.removeprefix(beginning)
        raise AssertionError(f"{ours} has no published name")


def read_published(values: Mapping[str, Any]) -> Published:
    """Return the settings of a config.json, by its model_type, or in state-spaces' layout, which has none.

    Raises ValueError with one sentence."""
    settings = Settings(values)
    model_type = values.get("model_type")
    if model_type is None and {"d_model", "n_layer"} <= set(values):
        return _state_spaces(settings)
    if not isinstance(model_type, str) or model_type not in READERS:
        raise ValueError(
            f"model_type={model_type!r} is not supported; choose a checkpoint of one of "
            f"{', '.join(READERS)}, or one in state-spaces' layout (d_model, n_layer, ssm_cfg)"
        )
    settings.expect("quantization_config", (None,), None)
    return READERS[model_type](settings)


def _frame(settings: Settings, *, is_tied: bool, norm_eps: str, default_eps: float) -> dict[str, Any]:
    """Return the Decoder's own settings, except the feed-forward's; `is_tied` is the default of tying."""
    eps = settings.number(norm_eps, default_eps)
    if eps < 0:
        raise ValueError(f"{norm_eps}={eps} must not be negative")
    return {
        "vocab_size": settings.whole("vocab_size"),
        "d_model": settings.whole("hidden_size"),
        "num_layers": settings.whole("num_hidden_layers"),
        "is_tied": settings.flag("tie_word_embeddings", is_tied),
        "norm_eps": eps,
    }


def _rope_theta(settings: Settings) -> float:
    """rope_theta, at the top or, as transformers 5 writes it, in rope_parameters or rope_scaling."""
    found = {}
    settings.expect("partial_rotary_factor", (None, 1.0, 1), None)
    if settings.number("rope_theta", None) is not None:
        found["rope_theta"] = settings.number("rope_theta")
    for name in ("rope_parameters", "rope_scaling"):
        section = settings.section(name)
        for key, value in section.values.items():  # transformers 5 may have a mapping a kind of layer
            if isinstance(value, Mapping):
                section.expect(key, (None,), None)
        section.expect("rope_type", ("default", None), None)
        section.expect("type", ("default", None), None)
        section.expect("partial_rotary_factor", (None, 1.0, 1), None)
        if section.number("rope_theta", None) is not None:
            found[f"{name}.rope_theta"] = section.number("rope_theta")
    if len(set(found.values())) > 1:
        spelled = " and ".join(f"{name}={value}" for name, value in found.items())
        raise ValueError(f"{spelled} disagree; leave the right one alone in config.json")
    theta = float(next(iter(found.values()), 10_000.0))
    if theta <= 0:
        raise ValueError(f"rope_theta={theta} must be positive")
    return theta


def _active_window(settings: Settings, default: int, default_positions: int) -> int | None:
    """Return the tokens of a sliding window that is narrower than the positions the model is made for, else
    None."""
    if settings.values.get("sliding_window", default) is None:
        return None
    window = settings.whole("sliding_window", default)
    return window if window < settings.whole("max_position_embeddings", default_positions) else None


def _llama_like(settings: Settings, kind: str) -> Published:
    use_bias = use_output_bias = use_feed_forward_bias = False
    num_kv_heads = window = None
    layer_types = settings.values.get("layer_types")
    if layer_types != ["full_attention"] * settings.whole("num_hidden_layers"):
        settings.expect("layer_types", (None,), None)
    if kind == "llama":
        use_bias = use_output_bias = settings.flag("attention_bias", False)
        use_feed_forward_bias = settings.flag("mlp_bias", False)
    elif kind == "mistral":
        window = _active_window(settings, 4096, 4096 * 32)
        num_kv_heads = None if "num_key_value_heads" in settings.values else 8
    else:  # qwen2: biases on q, k and v by definition, and a window only where it is switched on
        use_bias = True
        if settings.flag("use_sliding_window", False):
            num_full = settings.whole("max_window_layers", 28)
            if not layer_types and num_full < settings.whole("num_hidden_layers"):
                window = _active_window(settings, 4096, 32_768)
                if window is not None:
                    raise ValueError(
                        f"sliding_window={window} with biases on q, k and v is not supported; "
                        "choose a checkpoint without a sliding window"
                    )
    settings.expect("hidden_act", SILU, "silu")
    shared = {
        "num_heads": settings.whole("num_attention_heads"),
        "num_kv_heads": settings.whole("num_key_value_heads", num_kv_heads),
        "head_width": settings.whole("head_dim", None),
        "rope_theta": _rope_theta(settings),
    }
    if window is None:
        mixer = partial(Attention, use_bias=use_bias, use_output_bias=use_output_bias, **shared)
    else:
        mixer = partial(SlidingWindowAttention, window_tokens=window, **shared)
    decoder = {
        **_frame(settings, is_tied=False, norm_eps="rms_norm_eps", default_eps=1e-6),
        "d_ff": _feed_forward_width(settings),
        "use_feed_forward_bias": use_feed_forward_bias,
        "mixers": [mixer],
    }
    return Published(decoder=decoder, names=LLAMA_NAMES)


def _feed_forward_width(settings: Settings) -> int:
    width = settings.whole("intermediate_size")
    if width < 1:  # 0 would be a Decoder without a feed-forward
        raise ValueError(f"intermediate_size={width} must be positive")
    return width


def _dt_rank(settings: Settings, name: str) -> int | None:
    """None stands for d_model / 16 rounded up, which both codes write "auto"."""
    return None if settings.values.get(name, "auto") == "auto" else settings.whole(name)


def _inner_width(settings: Settings, expand: str, d_model: int) -> int:
    return int(settings.number(expand) * d_model)


def _mamba(settings: Settings) -> Published:
    settings.expect("hidden_act", SILU, "silu")
    frame = _frame(settings, is_tied=True, norm_eps="layer_norm_epsilon", default_eps=1e-5)
    inner = settings.whole("intermediate_size", None)
    mixer = partial(
        Mamba,
        state_width=settings.whole("state_size"),
        conv_width=settings.whole("conv_kernel", 4),
        inner_width=_inner_width(settings, "expand", frame["d_model"]) if inner is None else inner,
        dt_rank=_dt_rank(settings, "time_step_rank"),
        use_conv_bias=settings.flag("use_conv_bias", True),
        use_bias=settings.flag("use_bias", False),
    )
    return Published(
        decoder={**frame, "d_ff": 0, "mixers": [mixer]}, names=MAMBA_NAMES, aliases=MAMBA_ALIASES
    )


def _mamba2(settings: Settings) -> Published:
    """Return the Decoder of Mamba-2. Its gated norm is over the whole inner width whatever n_groups is, as
    transformers evaluates it; state-spaces' own code norms each group for itself."""
    settings.expect("hidden_act", SILU, "silu")
    frame = _frame(settings, is_tied=False, norm_eps="layer_norm_epsilon", default_eps=1e-5)
    inner = _inner_width(settings, "expand", frame["d_model"])
    num_heads, head_width = settings.whole("num_heads"), settings.whole("head_dim")
    if num_heads * head_width != inner:
        raise ValueError(
            f"num_heads={num_heads} of head_dim={head_width} must make up expand * hidden_size = {inner}"
        )
    mixer = partial(
        Mamba2,
        state_width=settings.whole("state_size"),
        num_heads=num_heads,
        num_groups=settings.whole("n_groups"),
        num_norm_groups=1,
        inner_width=inner,
        conv_width=settings.whole("conv_kernel", 4),
        chunk_tokens=settings.whole("chunk_size", 256),
        use_conv_bias=settings.flag("use_conv_bias", True),
        use_bias=settings.flag("use_bias", False),
        norm_eps=frame["norm_eps"],
        step_limits=settings.range("time_step_limit", (0.0, math.inf)),
    )
    return Published(
        decoder={**frame, "d_ff": 0, "mixers": [mixer]}, names=MAMBA_NAMES, aliases=MAMBA_ALIASES
    )


def _ttt(settings: Settings) -> Published:
    settings.expect("hidden_act", SILU, "silu")
    settings.expect("ttt_layer_type", ("linear", "mlp"), "linear")
    layer = TTTMLP if settings.values.get("ttt_layer_type") == "mlp" else TTTLinear
    conv_width, pre_conv = settings.whole("conv_kernel", 4), settings.flag("pre_conv", False)
    mixer = partial(
        layer,
        num_heads=settings.whole("num_attention_heads"),
        mini_batch_tokens=settings.whole("mini_batch_size", 16),
        base_lr=settings.number("ttt_base_lr", 1.0),
        base_lr_start=None,
        rope_theta=_rope_theta(settings),
        share_qk=settings.flag("share_qk", False),
        use_gate=settings.flag("use_gate", False),
        conv_width=conv_width,
    )
    decoder = {
        **_frame(settings, is_tied=True, norm_eps="rms_norm_eps", default_eps=1e-6),
        "d_ff": _feed_forward_width(settings),
        "pre_mixer": partial(ShortConvolution, width=conv_width) if pre_conv else None,
        "mixers": [mixer],
    }
    return Published(decoder=decoder, names=_ttt_names(int(pre_conv)))


def _state_spaces(settings: Settings) -> Published:
    """Read the layout of state-spaces/mamba: the layer's settings in ssm_cfg, by the constructors' names."""
    for name, supported in (("d_intermediate", 0), ("attn_layer_idx", []), ("rms_norm", True)):
        settings.expect(name, (supported, None) if name == "attn_layer_idx" else (supported,), supported)
    ssm = settings.section("ssm_cfg")
    ssm.expect("layer", ("Mamba1", "Mamba2"), "Mamba1")
    d_model, vocab_size = settings.whole("d_model"), settings.whole("vocab_size")
    multiple = settings.whole("pad_vocab_size_multiple", 8)
    if multiple < 1:
        raise ValueError(f"pad_vocab_size_multiple={multiple} must be positive")
    inner = int(ssm.number("expand", 2) * d_model)
    layer: dict[str, Any] = {
        "conv_width": ssm.whole("d_conv", 4),
        "inner_width": inner,
        "use_conv_bias": ssm.flag("conv_bias", True),
        "use_bias": ssm.flag("bias", False),
    }
    known = {"d_state", "d_conv", "expand", "conv_bias", "bias"}
    if ssm.values.get("layer", "Mamba1") == "Mamba1":
        known |= {"dt_rank"}
        mixer = partial(
            Mamba, state_width=ssm.whole("d_state", 16), dt_rank=_dt_rank(ssm, "dt_rank"), **layer
        )
    else:
        known |= {"headdim", "ngroups", "chunk_size", "dt_limit"}
        for name, supported in (("rmsnorm", True), ("norm_before_gate", False), ("D_has_hdim", False)):
            ssm.expect(name, (supported,), supported)
            known.add(name)
        ssm.expect("activation", SILU, "swish")
        ssm.expect("d_ssm", (None, inner), None)
        known |= {"activation", "d_ssm"}
        mixer = partial(
            Mamba2,
            state_width=ssm.whole("d_state", 128),
            head_width=ssm.whole("headdim", 64),
            num_groups=ssm.whole("ngroups", 1),
            chunk_tokens=ssm.whole("chunk_size", 256),
            norm_eps=STATE_SPACES_EPS,
            step_limits=ssm.range("dt_limit", (0.0, math.inf)),
            **layer,
        )
    for name in sorted(set(ssm.values) - known - set(STATE_SPACES_NEUTRAL)):
        raise ValueError(f"ssm_cfg.{name}={ssm.values[name]!r} is not supported; choose another checkpoint")
    decoder = {
        "vocab_size": math.ceil(vocab_size / multiple) * multiple,
        "d_model": d_model,
        "num_layers": settings.whole("n_layer"),
        "is_tied": settings.flag("tie_embeddings", True),
        "norm_eps": STATE_SPACES_EPS,
        "d_ff": 0,
        "mixers": [mixer],
    }
    return Published(decoder=decoder, names=MAMBA_NAMES, aliases=MAMBA_ALIASES)


READERS: dict[str, Callable[[Settings], Published]] = {
    "llama": partial(_llama_like, kind="llama"),
    "mistral": partial(_llama_like, kind="mistral"),
    "qwen2": partial(_llama_like, kind="qwen2"),
    "mamba": _mamba,
    "mamba2": _mamba2,
    "ttt": _ttt,
}
