"""Models of transformers behind the contract: their numbers, their caches, a sentence for the rest."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from archs.base import clone_state, state_bytes, state_tensors
from archs.pretrained.load import load_pretrained
from archs.pretrained.transformers_load import huggingface_model
from harness.measure.turns import TimingRun
from tasks.base import Measurement
from tasks.latency import Latency

transformers = pytest.importorskip("transformers", reason="needs the extra `huggingface`")

GOLDENS = Path(__file__).resolve().parent.parent.parent / "goldens"
NUM_TOKENS = 45
WINDOW = 16
SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 0}
HEADS = {"num_attention_heads": 2, "intermediate_size": 64}
GROUPED = SIZES | HEADS | {"num_key_value_heads": 1}

#: What the tests make: (class before Config and its ending, settings).
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "neox": ("GPTNeoX", "ForCausalLM", SIZES | HEADS),
    "gpt2": ("GPT2", "LMHeadModel", {**SIZES, "num_attention_heads": 2, "max_position_embeddings": 64}),
    "window": ("Mistral", "ForCausalLM", GROUPED | {"sliding_window": WINDOW}),
    "mixture": ("Mixtral", "ForCausalLM", GROUPED | {"num_local_experts": 4}),
    "mamba": ("Mamba", "ForCausalLM", {**SIZES, "state_size": 8}),
    "hybrid": (
        "FalconH1",
        "ForCausalLM",
        GROUPED
        | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
        | {"mamba_chunk_size": 32},
    ),
}

#: transformers computes parts of its recurrent layers in float32, also in a float64 model.
TOLERANCE = {"neox": 1e-9, "gpt2": 1e-9, "window": 1e-9, "mixture": 1e-5, "mamba": 1e-5, "hybrid": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small random model, saved by transformers."""
    root = tmp_path_factory.mktemp("models")

    def make(name: str) -> Path:
        if not (root / name).exists():
            family, ending, settings = MODELS[name]
            torch.manual_seed(0)
            config = getattr(transformers, f"{family}Config")(**settings)
            getattr(transformers, family + ending)(config).save_pretrained(root / name)
        return root / name

    return make


def load(folder: Path, attention: str = "auto", vocab_size: int = 96) -> Any:
    return huggingface_model(path=str(folder), vocab_size=vocab_size, implementation={"attention": attention})


def some_tokens(num_tokens: int = NUM_TOKENS, batch: int = 2) -> Tensor:
    return torch.randint(0, 96, (batch, num_tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def run_chunks(model: Any, tokens: Tensor, sizes: list[int]) -> Tensor:
    state, outputs, position = model.init_state(*tokens.shape), [], 0
    for size in sizes:
        logits, state = model.prefill(tokens[:, position : position + size], state, num_logits=size)
        outputs.append(logits)
        position += size
    for step in range(position, tokens.shape[1]):
        logits, state = model.decode(tokens[:, step], state)
        outputs.append(logits[:, None])
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("name", MODELS)
def test_any_chunking_gives_what_transformers_gives(name: str, folder: Callable[[str], Path]) -> None:
    dtype = torch.float32 if name == "mixture" else torch.float64  # its product of experts has no float64
    model = load(folder(name)).to(dtype)
    published = transformers.AutoModelForCausalLM.from_pretrained(folder(name), dtype=dtype)
    tokens = some_tokens()
    with torch.no_grad():
        expected = published(tokens, use_cache=False).logits
        assert torch.equal(model(tokens), expected)
    for sizes in ([NUM_TOKENS], [1, 20, 24], [7, 16, 1, 17], []):
        torch.testing.assert_close(run_chunks(model, tokens, sizes), expected, rtol=0, atol=TOLERANCE[name])


@pytest.mark.parametrize("name", MODELS)
def test_a_long_prompt_is_timed_as_transformers_reads_it(name: str, folder: Callable[[str], Path]) -> None:
    """Beyond latency's chunk_tokens too: in one call, where a second one would go token by token."""
    model, widths = load(folder(name)), []
    model.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: widths.append(inputs[0].shape[1])
    )
    task = Latency(
        context_lengths_tokens=[NUM_TOKENS],
        batch_sizes=[1],
        num_samples=1,
        num_decode_steps=1,
        max_cell_s=60,
        chunk_tokens=32,
    )
    cell = {"phase": "prefill", "context_tokens": NUM_TOKENS, "batch_size": 1}
    ((_, result),) = task.measure_in_turn({name: model}, cell, TimingRun(torch.device("cpu")))
    assert isinstance(result, Measurement)
    is_recurrent = name in ("mamba", "hybrid")
    assert model.reads_whole_prompts == is_recurrent
    one_prefill = [NUM_TOKENS] if is_recurrent else [32, NUM_TOKENS - 32]
    assert widths == 3 * one_prefill, "first call, warm-up, sample"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("batch", "num_tokens"), [(1, 1), (2, 45), (3, 15), (2, 16)])
def test_state_bytes_are_predicted_and_stay(
    name: str, batch: int, num_tokens: int, folder: Callable[[str], Path]
) -> None:
    model = load(folder(name))
    state = model.init_state(batch, num_tokens)
    predicted = model.state_bytes_at(batch, num_tokens)
    assert state_bytes(state) == predicted
    with torch.no_grad():
        _, state = model.prefill(some_tokens(num_tokens, batch), state)
    assert state_bytes(state) == predicted
    assert all(tensor.shape[0] == batch for tensor in state_tensors(state))


@pytest.mark.parametrize("name", MODELS)
def test_the_state_holds_what_the_cache_of_transformers_holds(
    name: str, folder: Callable[[str], Path]
) -> None:
    model, tokens = load(folder(name)), some_tokens()
    cache = transformers.DynamicCache(config=model.config)
    argument = "cache_params" if name == "mamba" else "past_key_values"
    with torch.no_grad():
        model.model(tokens, use_cache=True, **{argument: cache})
        _, state = model.prefill(tokens, model.init_state(2, NUM_TOKENS))
    for layer, tensors in zip(cache.layers, state.layers, strict=True):
        attention = [layer.keys, layer.values] if hasattr(layer, "keys") else []
        recurrent = [
            *getattr(layer, "conv_states", {}).values(),
            *getattr(layer, "recurrent_states", {}).values(),
        ]
        assert len(tensors) == len(attention) + len(recurrent) > 0
        assert all(map(torch.equal, tensors, [*attention, *recurrent]))


def test_a_window_keeps_what_the_next_token_may_see(folder: Callable[[str], Path]) -> None:
    model = load(folder("window"))
    per_token = 2 * 2 * 1 * 16 * 4  # layers, keys and values, heads, width, bytes
    assert model.state_bytes_at(1, WINDOW - 2) == (WINDOW - 2) * per_token
    assert model.state_bytes_at(1, 1 << 20) == (WINDOW - 1) * per_token


@pytest.mark.parametrize("name", ["neox", "window", "mamba", "hybrid"])
def test_a_clone_branches(name: str, folder: Callable[[str], Path]) -> None:
    model, tokens = load(folder(name)), some_tokens()
    with torch.no_grad():
        _, state = model.prefill(tokens[:, :30], model.init_state(2, NUM_TOKENS))
        branch = clone_state(state)
        expected, state = model.decode(tokens[:, 30], state)
        model.decode(tokens[:, 31], state)
        logits, _ = model.decode(tokens[:, 30], branch)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("name", ["neox", "gpt2", "window", "mixture", "mamba"])
def test_matrix_flops_hold_against_a_counter(name: str, folder: Callable[[str], Path]) -> None:
    """Within 2%, in the form where attention is two dense products. Of a mixture the counter sees nothing of
    what its experts do in one product, so it is compared in the form that loops over them."""
    model = load(folder(name), "auto" if name == "mamba" else "plain")
    if name == "mixture":
        model.model.set_experts_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.prefill(some_tokens(64, 1), model.init_state(1, 64))
    formula = model.flops(64, "prefill")
    expected = formula.matmul + formula.attention_square
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)


def test_flops_know_the_window_and_the_recurrence(folder: Callable[[str], Path]) -> None:
    window, mamba = load(folder("window")), load(folder("mamba"))
    pairs = WINDOW * (WINDOW + 1) / 2 + (100 - WINDOW) * WINDOW
    assert window.flops(100, "prefill").attention == 2 * pairs * 4 * 32  # layers, pairs, 4 D
    assert window.flops(100, "decode").attention == 2 * WINDOW * 4 * 32
    assert mamba.flops(100, "decode").scan == 2 * 7 * 64 * 8  # layers, 7 D' N
    ours = load_pretrained(folder("mamba"))
    for phase in ("prefill", "decode"):
        assert mamba.flops(100, phase).total == pytest.approx(ours.flops(100, phase).total, rel=1e-3)


def test_the_names_of_attention_are_ours(folder: Callable[[str], Path]) -> None:
    model = load(folder("neox"))
    assert model.implementation == "sdpa" and model.config._attn_implementation == "sdpa"
    assert load(folder("neox"), "plain").config._attn_implementation == "eager"
    assert load(folder("mamba")).operation is None
    with pytest.raises(ValueError, match=r"implementation\.attention=reference.*sdpa"):
        load(folder("neox"), "reference")


def test_a_full_state_is_an_error(folder: Callable[[str], Path]) -> None:
    for name in ("neox", "window"):
        model = load(folder(name))
        _, state = model.prefill(some_tokens(8), model.init_state(2, 8))
        with pytest.raises(ValueError, match="room for 8 tokens and was given 9"):
            model.decode(some_tokens(1)[:, 0], state)


def test_learned_positions_end(folder: Callable[[str], Path]) -> None:
    model = load(folder("gpt2"))
    with pytest.raises(NotImplementedError, match="learned positions for 64 tokens, and 65"):
        model.init_state(1, 65)
    with pytest.raises(NotImplementedError, match="learned positions"):
        model(some_tokens(65))
    load(folder("neox")).init_state(1, 1 << 12)  # rotary ones do not


@pytest.mark.parametrize("name", ["neox", "mamba"])
def test_no_weight_is_read_on_the_meta_device(name: str, folder: Callable[[str], Path]) -> None:
    loaded = load(folder(name))
    with torch.device("meta"):
        model = load(folder(name))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.num_parameters == loaded.num_parameters
    assert model.state_bytes_at(2, 1000) == loaded.state_bytes_at(2, 1000)
    assert model.flops(1000, "prefill") == loaded.flops(1000, "prefill")


# What does not fit is a sentence


@pytest.fixture
def copied(folder: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder("neox"), tmp_path / "copy"))


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_model_that_transformers_does_not_bring_is_not_run(copied: Path) -> None:
    (copied / "modeling_own.py").write_text("raise SystemExit('it was run')")
    change_config(copied, model_type="own", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    with pytest.raises(ValueError, match=r"model_type='own'.*code from a folder is never run") as error:
        load(copied)
    assert "\n" not in str(error.value)


def test_tensors_that_are_missing_or_left_over_are_listed(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    tensors["embed_out.extra"] = tensors.pop("gpt_neox.layers.1.mlp.dense_h_to_4h.bias")
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing gpt_neox\.layers\.1\.mlp.*unexpected lm_head\.extra"):
        load(copied)


def test_a_tensor_of_another_shape_is_one_sentence(copied: Path) -> None:
    change_config(copied, intermediate_size=48)
    with pytest.raises(ValueError, match=r"size mismatch|mismatched|shape") as error:
        load(copied)
    assert "\n" not in str(error.value)


def test_pickles_are_refused(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickles alone \(pytorch_model\.bin\)"):
        load(copied)


def test_what_else_does_not_fit_is_a_sentence(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"data\.vocab_size=257.*data\.vocab_size=96"):
        load(copied, vocab_size=257)
    with pytest.raises(ValueError, match=r"/nowhere holds no config\.json"):
        load(Path("/nowhere"))
    change_config(copied, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match="quantized"):
        load(copied)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"transformers, which is not installed; run pip install"):
        load(copied)
