"""A published checkpoint is measured as it is, in the tokens of its own vocabulary."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from archs.attention import Attention
from archs.decoder import Decoder
from archs.pretrained.load import pretrained_model
from harness import cost
from harness.record.schema import Point

Command = Callable[..., tuple[int, str, str]]
Points = Callable[..., list[Point]]
GOLDEN = Path(__file__).resolve().parent.parent / "goldens" / "llama"

NUM_PARAMETERS = 2 * 257 * 16 + 4 * 16**2 + 3 * 16 * 24 + 3 * 16
NAMES = {
    "embedding.": "model.embed_tokens.",
    "blocks.": "model.layers.",
    "feed_forward_norm.": "post_attention_layernorm.",
    "feed_forward.": "mlp.",
    "mixers.0.": "self_attn.",
    "mixer_norms.0.": "input_layernorm.",
    "head.": "lm_head.",
}


def save_small_llama(folder: Path, vocab_size: int) -> Path:
    torch.manual_seed(0)
    mixer = partial(Attention, num_heads=2)
    model = Decoder(vocab_size=vocab_size, d_model=16, num_layers=1, d_ff=24, mixers=[mixer], is_tied=False)
    tensors = {}
    for name, tensor in model.state_dict().items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        tensors["model.norm.weight" if name == "norm.weight" else name] = tensor
    folder.mkdir()
    config = {"model_type": "llama", "vocab_size": vocab_size, "hidden_size": 16, "num_hidden_layers": 1}
    config |= {"intermediate_size": 24, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Over bytes and a document start: 257 tokens."""
    return save_small_llama(tmp_path / "small-llama", 257)


def test_it_reads_the_tokens_of_the_tokenizer_beside_it(
    quick_command: Command, tiny: list[str], points: Points, tmp_path: Path
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    folder = save_small_llama(tmp_path / "padded", 264)
    tokenizer.save(str(folder / "tokenizer.json"))
    code, _, err = quick_command(
        *["arch=pretrained", f"arch.path={folder}", f"data.tokenizer={folder}", "data.vocab_size=264"],
        *[*tiny, "task=[perplexity]", f"output={tmp_path / 'output'}"],
        *["tasks.perplexity.context_lengths_tokens=[128]", "tasks.perplexity.num_documents=2"],
    )
    assert code == 0, err
    (point,) = points(tmp_path / "output", task="perplexity")
    assert point.status == "ok"


def test_it_is_measured_and_not_trained(
    quick_command: Command,
    tiny: list[str],
    tiny_tasks: list[str],
    points: Points,
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "output"
    arguments = ["arch=pretrained", f"arch.path={checkpoint}", *tiny, *tiny_tasks, f"output={output}"]
    code, out, err = quick_command(*arguments, "train.search=true", "train.search_grid=[1e-3]")
    assert code == 0, err
    found = points(output)
    assert {p.task for p in found} >= {"train", "cost", "perplexity", "needle", "latency"}
    assert "learning_rate_search" not in {p.task for p in found}
    assert {p.status for p in found} == {"ok"}
    assert {p.arch for p in found} - {""} == {"small-llama"}
    (train,) = points(output, task="train")
    unknown = ("trained_tokens", "train_seconds", "tokens_per_s", "learning_rate", "num_skipped_steps")
    assert all(train.metrics[name] is None for name in unknown)
    assert 7 < train.metrics["final_validation_bits_per_byte"] < 10, "it knows nothing"
    assert train.details["checkpoint"] == str(checkpoint)
    assert train.details["trained_lengths_tokens"] == []
    assert train.metrics["num_parameters"] == NUM_PARAMETERS
    assert {p.metrics["is_trained_length"] for p in points(output, task="needle")} == {None}
    assert not (output / "checkpoints").exists()
    code, out, err = quick_command(*arguments, "train.search=true", "train.search_grid=[1e-3]")
    assert code == 0 and "everything is measured already" in out, err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], ["arch.path has no value", "arch.path="]),
        (["arch.path=/nowhere"], ["/nowhere is not a folder"]),
        ([f"arch.path={GOLDEN}"], ["data.vocab_size=257", "96", f"data.tokenizer={GOLDEN}"]),
        ([f"arch.path={GOLDEN}", "data.vocab_size=96"], ["data.vocab_size=96 is smaller", "257"]),
        (["arch.path=x", "arch.is_pretrained=false"], ["learning_rate=null must be a number"]),
        (["arch.path=x", "arch.learning_rate=0.1"], ["learning_rate=0.1", "not trained here"]),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(
    quick_command: Command, tiny: list[str], tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    result = quick_command("arch=pretrained", *overrides, *tiny, f"output={tmp_path}")
    assert result.code == 2
    (line,) = result.error_lines
    assert all(word in line for word in words), line


def test_the_cost_card_reads_no_weights(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = cost.main(["arch=pretrained", f"arch.path={checkpoint}"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["num_parameters"] == NUM_PARAMETERS
    assert "small-llama" in out


# As the base of Transformer²

EXPERTS = [
    "arch=transformer_squared",
    "arch@reference=pretrained",
    "arch.post_training.method=fine_tuning",
    "arch.post_training.lora.method=reinforce",
    "arch.post_training.reinforce.num_steps=2",
    "arch.post_training.prompts.batch_size=4",
    "arch.post_training.dispatch.num_classifier_batches=1",
    "arch.post_training.dispatch.num_expert_steps=1",
    "arch.post_training.few_shot.num_iterations=1",
    "arch.tasks.adaptation.num_prompts=6",
    "arch.tasks.adaptation.num_timed_prompts=2",
]

#: An architecture's own tasks go with those that `task` names.
ONE_TASK = [
    "task=[perplexity]",
    "tasks.perplexity.context_lengths_tokens=[128]",
    "tasks.perplexity.num_documents=2",
]


def test_experts_are_trained_on_a_loaded_base(
    quick_command: Command, tiny: list[str], points: Points, checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    arguments = [*EXPERTS, f"reference.path={checkpoint}", *tiny, *ONE_TASK, f"output={output}"]
    code, out, err = quick_command(*arguments)
    assert code == 0, err
    # One layer of 16 to 24: an expert has 3 times 16, rank 1 on one matrix 16 + 24.
    placement = (
        "LoRA of rank 1 on 1 of 3 feed-forward matrices, 40 parameters a domain against an expert's 48"
    )
    assert f"transformer_squared: {placement} (-17%)." in out
    (train,) = points(output, task="train")
    assert train.status == "ok", train.reason
    assert all(train.metrics[name] is None for name in ("trained_tokens", "train_seconds", "learning_rate"))
    assert train.metrics["expert_train_seconds"] > 0 and train.metrics["lora_train_seconds"] > 0
    assert (train.metrics["num_expert_parameters"], train.metrics["num_lora_parameters"]) == (48, 40)
    assert (train.details["expert_method"], train.details["lora_method"]) == ("fine_tuning", "reinforce")
    assert train.details["base"]["checkpoint"] == str(checkpoint)
    assert set(train.details["experts"]) == set(train.details["few_shot"]) == {"any", "needle"}
    assert all(not history["sampled_rewards"] for history in train.details["experts"].values())
    assert all(len(history["sampled_rewards"]) == 2 for history in train.details["lora"].values())
    assert set(train.details["dispatch_accuracy"]) == {"classifier", "prompt", "classification_expert"}
    adapted = points(output, task="adaptation")
    assert len(adapted) == 2 * 7 and {p.status for p in adapted} == {"ok"}
    for point in adapted:
        name, metrics = point.cell["adaptation"], point.metrics
        assert metrics["num_examples"] == 6 == len(point.samples["answer_log_probability_nats"])
        assert metrics["second_pass_ms"] > 0
        is_told = name in ("base", "expert", "lora", "few_shot")
        assert (metrics["right_domain_share"] is None) == is_told
        assert (metrics["first_pass_ms"] is None) == is_told
    tuned = {p.cell["adaptation"]: p.metrics["num_tuned_parameters"] for p in adapted}
    classifier = 2 * 2 * 16 + 2
    assert tuned == {
        "base": 0,
        "expert": 48,
        "lora": 40,
        "prompt": 96,
        "classification_expert": 96 + 48,
        "classifier": 96 + classifier,
        "few_shot": 96 + 2,
    }
    checkpoints = list((output / "checkpoints").iterdir())
    assert len(checkpoints) == 1
    for path in (output / "records").iterdir():
        path.unlink()
    code, out, err = quick_command(*arguments)
    assert code == 0 and "LoRA of rank" not in out, "from its checkpoint"
    again = points(output, task="adaptation")
    assert [p.samples["answer_log_probability_nats"] for p in again] == [
        p.samples["answer_log_probability_nats"] for p in adapted
    ]
    (checkpoint / "README.md").write_text("another file")
    assert quick_command(*arguments, "retry_failed=true")[0] == 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["arch@reference=mamba"], ["no feed-forward matrices", "d_ff=0", "arch@reference=transformer"]),
        ([f"reference.path={GOLDEN.parent / 'mamba'}", "data.vocab_size=96"], ["no feed-forward matrices"]),
        (["reference.path=/nowhere"], ["/nowhere is not a folder"]),
        (
            ["arch@reference=transformer", "arch.post_training.method=dpo"],
            ["arch.post_training.method='dpo' must be one of reinforce, fine_tuning."],
        ),
        (
            ["arch@reference=transformer", "arch.post_training.reinforce.kl_weight=-1"],
            ["arch.post_training.reinforce.kl_weight=-1 must not be negative."],
        ),
        (
            ["arch@reference=transformer", "+arch.post_training.few_shot.shots=3"],
            ["Unknown key of arch.post_training.few_shot", "'shots'", "num_shots"],
        ),
        (
            ["arch@reference=transformer", "arch.post_training.fine_tuning.num_steps=0"],
            ["arch.post_training.fine_tuning.num_steps=0 must be positive."],
        ),
        (
            ["arch@reference=transformer", "arch.model.dispatch_strategy=guess"],
            ["dispatch_strategy='guess' must be one of"],
        ),
        (
            ["arch@reference=transformer", "arch.tasks.adaptation.adaptations=[base,magic]"],
            ["arch.tasks.adaptation.adaptations", "base, expert, lora"],
        ),
    ],
)
def test_what_is_wrong_with_experts_is_said_in_a_sentence(
    quick_command: Command, tiny: list[str], tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    result = quick_command(*EXPERTS, *tiny, *overrides, f"output={tmp_path}")
    assert result.code == 2
    (line,) = result.error_lines
    assert line.startswith("error: ") and all(word in line for word in words), line


# The hub, without a network

IMPLEMENTATION = {"attention": "plain"}


def test_a_repository_of_the_hub_is_read_from_its_cache(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--somebody--small-llama"
    shutil.copytree(checkpoint, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for path in ("hub:somebody/small-llama", f"hub:somebody/small-llama@{commit}"):
        model = pretrained_model(path=path, vocab_size=257, implementation=IMPLEMENTATION)
        assert model.checkpoint.endswith(commit) and model.blocks[0].mixers[0].implementation == "plain"
    with pytest.raises(ValueError, match=r"hub:somebody/else cannot be had from the hub .*folder"):
        pretrained_model(path="hub:somebody/else", vocab_size=257, implementation=IMPLEMENTATION)


def test_the_hub_without_its_package_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"huggingface_hub, which is not installed; run pip install"):
        pretrained_model(path="hub:nobody/nothing", vocab_size=257, implementation=IMPLEMENTATION)
