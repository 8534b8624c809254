"""A user's mistake ends in one sentence, exit code 2 and no traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

Command = Callable[..., tuple[int, str, str]]

#: What is typed, and words of the sentence that answers it.
MISTAKES = [
    (["arch=foo"], ["Unknown arch: 'foo'", "mamba, mamba2", "transformer"]),
    (["arch=mambo"], ["Did you mean 'mamba'?"]),
    (["task=foo"], ["Unknown task: 'foo'", "latency, needle, perplexity"]),
    (["task=[needle,foo]"], ["Unknown task: 'foo'", "latency, needle, perplexity"]),
    (["size=foo"], ["Unknown size: 'foo'", "nano, small, tiny"]),
    (["size=125"], ["a name was expected", "size=125m"]),
    (["arch=null"], ["a name was expected"]),
    (["task=[needle,5]"], ["a name was expected"]),
    (["data=foo"], ["Unknown data: 'foo'", "text_folder"]),
    (
        ["experiment=foo"],
        ["Unknown experiment: 'foo'", "cpu_small, gpu_small, h200_latency, h200_quality, regress"],
    ),
    (["foo=1"], ["Unknown configuration key: 'foo'", "arch, archs, data, device"]),
    (["train.num_step=1"], ["'train.num_step'", "Did you mean 'num_steps'?"]),
    (["arch.model.foo=1"], ["'arch.model.foo'", "d_model", "num_layers"]),
    (["tasks.needle.foo=1"], ["'tasks.needle.foo'", "num_examples"]),
    (["implementation.foo=auto"], ["'implementation.foo'", "attention"]),
    (["arch@foo=mamba"], ["arch@reference"]),
    (["arch"], ["'arch'", "key=value"]),
    (["output=[1"], ["'output=[1'", "key=value"]),
    (["hydra.mode=FOO"], ["hydra.mode=FOO", "MULTIRUN"]),
    (["seed=${foo}"], ["'foo' not found"]),
    (["data=text_folder", "data.path=???"], ["data.path has no value"]),
    (["arch=[]"], ["arch=[] names no architecture; write arch=NAME", "archs=[NAME,NAME]", "lineup=NAME"]),
    (["seed=abc"], ["seed='abc' must be a whole number."]),
    (["job_timeout_s=abc"], ["job_timeout_s='abc' must be a number."]),
    (["retry_failed=3"], ["retry_failed=3 must be true or false."]),
    (["interleave=[transformer]"], ["interleave is no setting any more; write archs=[NAME,NAME] or lineup"]),
    (["+interleave=[mamba]"], ["interleave is no setting any more; write archs=[NAME,NAME] or lineup"]),
    (["archs=transformer"], ["archs='transformer' must be a list"]),
    (["archs=[]"], ["archs=[] must hold at least one."]),
    (["seeds=[0,-1]"], ["seeds[1]=-1 must not be negative."]),
    (["lineup=foo"], ["Unknown lineup: 'foo'", "all, default"]),
    (["arch=mamba", "archs=[recurrent]"], ["arch=... and archs=... choose twice; write one of them."]),
    (["arch=mamba", "lineup=all"], ["arch=... and lineup=... choose twice; write one of them."]),
    (["seed=1", "seeds=[1,2]"], ["seed=... and seeds=... choose twice; write one of them."]),
    (["size.d_model=wide"], ["size.d_model='wide' must be a whole number."]),
    (["tasks=needle"], ["tasks='needle' holds the tasks' settings", "task=[NAME]"]),
    (["train.stream=5"], ["train.stream=5 must be a mapping"]),
    (["data.corpus=5"], ["data.corpus=5 must be a mapping"]),
    (["device=foo"], ["device='foo' must be one of auto, cpu, cuda."]),
    (["dtype=float16"], ["dtype='float16' must be one of float32, bfloat16."]),
    (["match=foo"], ["match='foo' must be one of parameters, none."]),
    (["num_threads=0"], ["num_threads=0 must be positive."]),
    (
        ["arch=mamba", "size=130m", "arch.model.num_layers=4"],
        [
            "arch.model.num_layers=4 changes nothing at size=130m",
            "set arch.published_model.num_layers instead.",
        ],
    ),
    (["train.num_steps=abc"], ["train.num_steps='abc' must be a whole number."]),
    (["train.num_steps=0"], ["train.num_steps=0 must be positive."]),
    (["train.betas=[0.9]"], ["train.betas=[0.9] must be a list of 2, each a number."]),
    (["train.betas=[0.9,1.0]"], ["train.betas=[0.9, 1.0] must lie between 0 and 1"]),
    (["train.gradient_clip=0"], ["train.gradient_clip=0 must be positive."]),
    (["train.gradient_clip=nan"], ["train.gradient_clip=nan must be a finite number."]),
    (["train.warmup_fraction=1.5"], ["train.warmup_fraction=1.5 must lie between 0 and 1."]),
    (["+train.final_learning_rate=0.01"], ["train.final_learning_rate=0.01 must", "the peak, 0.0025."]),
    (["+train.foo=1"], ["Unknown key of train: 'foo'", "weight_decay"]),
    (["+train.num_step=1"], ["Unknown key of train: 'num_step'. Did you mean 'num_steps'?"]),
    (["+train.learning_rate=1e-3"], ["train.learning_rate is not a setting", "arch.learning_rate"]),
    (["train.search=true", "train.search_grid=[]"], ["train.search_grid=[] must hold at least one"]),
    (["train.search=true", "train.search_grid=[1e-3,0]"], ["train.search_grid[1]=0 must be positive."]),
    (["+foo=1"], ["Unknown configuration key: 'foo'", "arch, archs, data, device"]),
    (["+size.num_layer=1"], ["Unknown key of size: 'num_layer'. Did you mean 'num_layers'?"]),
    (["job_timeout_s=inf"], ["job_timeout_s=inf must be a finite number."]),
    (["job_timeout_s=-1"], ["job_timeout_s=-1 must be positive."]),
    (["size.num_layers=0"], ["size.num_layers=0 must be positive."]),
    # From here on the checks of all jobs, or the worker, find it.
    (["+arch.model.foo=1"], ["Unknown key of arch.model (archs.decoder.Decoder): 'foo'", "norm_eps"]),
    (["+tasks.needle.foo=1"], ["Unknown key of tasks.needle (tasks.needle.Needle): 'foo'"]),
    (["tasks.needle.num_examples=few"], ["tasks.needle.num_examples='few' must be a whole number."]),
    (["~tasks.needle.depths"], ["tasks.needle (tasks.needle.Needle) lacks depths."]),
    (["arch.model._target_=foo.Bar"], ["arch.model._target_='foo.Bar' cannot be imported"]),
    (
        ["arch=transformer_squared", "arch.learning_rate=0.5"],
        ["arch.learning_rate=0.5", "arch@reference", "reference.learning_rate"],
    ),
    (["train.stream.batch_tokens=0"], ["batch_tokens=0 must be positive."]),
    (
        ["tasks.perplexity.context_lengths_tokens=[0]"],
        ["error: tasks.perplexity.context_lengths_tokens=0 must be positive."],
    ),
    (["tasks.needle.lengths_tokens=[-1]"], ["error: tasks.needle.lengths_tokens=-1 must be positive."]),
    (["tasks.latency.batch_sizes=[0]"], ["batch_sizes=[0] must be positive"]),
    (["tasks.latency.context_lengths_tokens=[-4]"], ["context_lengths_tokens=[-4] must be positive"]),
    (["tasks.needle.depths=[nan]"], ["tasks.needle.depths=[nan] must be a list, each item a finite number."]),
    (["num_workers=0"], ["num_workers=0 must be positive."]),
    (["num_workers=two"], ["num_workers='two' must be a whole number or one of auto."]),
    (["seed=-1"], ["seed=-1 must not be negative."]),
    (["train.stream.seed=-1"], ["seed=-1 must not be negative."]),
    (["arch=mamba", "arch.match.step=0"], ["arch.match.step=0 must be positive."]),
    (["arch=mamba", "arch.match.step=1.5"], ["arch.match.step=1.5 must be a whole number."]),
    (["arch.model.mixers=[]"], ["mixers=[] must hold at least one mixer"]),
    (["arch.name=a/b"], ["arch.name='a/b' names files"]),
    (["size.name=.."], ["size.name='..' names files"]),
    (["size.num_heads=3"], ["num_heads=3 must divide d_model=32"]),
    (["arch=titans_mac", "size.num_heads=5"], ["num_heads=5 must divide"]),
    (["arch=recurrent", "arch.match.step=1000"], ["match=parameters", "d_ff=1000", "match=none"]),
    (["implementation.attention=foo"], ["no implementation 'foo'", "sdpa"]),
    (
        ["arch=titans_mac", "implementation.segment_attention=flash_attn"],
        ["segment_attention has no implementation 'flash_attn'; choose one of auto, reference, plain, sdpa."],
    ),
    (["implementation.ssd=foo"], ["ssd has no implementation 'foo'", "mamba_ssm"]),  # not the Transformer's
    (["implementation.attention=flash_attn"], ["'flash_attn' of attention runs on cuda only"]),
    (
        ["arch=mamba", "implementation.selective_scan=mamba_ssm"],
        ["'mamba_ssm' of selective_scan runs on cuda"],
    ),
]


#: What is typed beside arch=transformer_squared, and words of the sentence.
EXPERT_MISTAKES = [
    ("arch.post_training.lora=null", "arch.post_training.lora=null must be a mapping with"),
    ("arch.post_training.dispatch=null", "arch.post_training.dispatch=null must be a mapping with"),
    ("arch.post_training.prompts=null", "arch.post_training.prompts=null must be a mapping with"),
    ("arch.post_training.few_shot=null", "arch.post_training.few_shot=null must be a mapping with"),
    ("arch.post_training.fine_tuning=null", "arch.post_training.fine_tuning=null must be a mapping with"),
    (
        "arch.post_training.method=[a]",
        "arch.post_training.method=['a'] must be one of reinforce, fine_tuning.",
    ),
    (
        "arch.post_training.lora.method=[a]",
        "arch.post_training.lora.method=['a'] must be one of reinforce",
    ),
    ("~arch.post_training.lora.method", "LoRATuning) lacks method."),
    ("~arch.post_training.prompts._target_", "must be a mapping with a _target_ to call."),
    ("arch.tasks=null", "arch.tasks=null must be a mapping, each value a mapping."),
    (
        "arch.tasks.adaptation=null",
        "arch.tasks={'adaptation': None} must be a mapping, each value a mapping.",
    ),
    (
        "arch.tasks.adaptation.prompts=null",
        "arch.tasks.adaptation.prompts=null must be a mapping with a _target_",
    ),
]


def assert_one_sentence(result: tuple, words: list[str]) -> None:
    assert result.code == 2, result.err
    errors = [line for line in result.err.splitlines() if not line.startswith("-- ")]
    errors = [line for line in errors if "parameters" not in line or line.startswith("error:")]
    assert len(errors) == 1, result.err
    assert errors[0].startswith("error: ") and errors[0].endswith("."), errors[0]
    for word in words:
        assert word in errors[0], errors[0]


@pytest.mark.parametrize(("overrides", "words"), MISTAKES, ids=[" ".join(o) for o, _ in MISTAKES])
def test_a_wrong_name_key_or_value(
    overrides: list[str], words: list[str], quick_command: Command, tiny: list[str], tmp_path: Path
) -> None:
    keys = {override.partition("=")[0] for override in overrides}
    kept = [o for o in tiny if o.partition("=")[0] not in keys]
    assert_one_sentence(quick_command(*kept, f"output={tmp_path / 'o'}", *overrides), words)
    assert not list(tmp_path.rglob("*.jsonl")) or "implementation" in overrides[-1]


@pytest.mark.parametrize(("override", "words"), EXPERT_MISTAKES, ids=[o for o, _ in EXPERT_MISTAKES])
def test_a_wrong_setting_of_the_experts(
    override: str, words: str, quick_command: Command, tiny: list[str], tmp_path: Path
) -> None:
    output = f"output={tmp_path / 'o'}"
    assert_one_sentence(quick_command(*tiny, "arch=transformer_squared", override, output), [words])
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["arch=foo"], ["Unknown arch: 'foo'"]),
        (["archs=[transformer,foo]"], ["Unknown arch: 'foo'"]),
        (["task=[foo]"], ["Unknown task: 'foo'"]),
        (["train.foo=1"], ["'train.foo'", "num_steps"]),
        (["train.num_steps=abc"], ["train.num_steps='abc'"]),
        (["arch"], ["key=value"]),
    ],
    ids=str,
)
def test_a_mistake_ends_a_whole_sweep(
    overrides: list[str], words: list[str], quick_command: Command, tiny: list[str], tmp_path: Path
) -> None:
    kept = [o for o in tiny if not o.startswith("train.num_steps")]
    result = quick_command("experiment=smoke", *kept, f"output={tmp_path / 'o'}", *overrides)
    lines = [line for line in result.err.splitlines() if "jobs, results in" not in line]
    assert_one_sentence(result._replace(err="\n".join(lines)), words)


def test_a_mistake_in_a_process_of_its_own(command: Command, tiny: list[str], tmp_path: Path) -> None:
    """As a user meets it: parent and worker are real processes."""
    output = f"output={tmp_path / 'o'}"
    assert_one_sentence(command("arch=foo", output), ["Unknown arch: 'foo'"])
    assert_one_sentence(command(*tiny, output, "+train.foo=1"), ["Unknown key of train"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["arch=foo"], ["Unknown arch: 'foo'"]),
        (["size.foo=1"], ["'size.foo'", "d_model"]),
        (["arch"], ["key=value"]),
        (["arch=[]"], ["add arch=NAME"]),
        (["size.d_model=abc"], ["size.d_model='abc' must be a whole number."]),
        (["dtype=foo"], ["dtype='foo' must be one of"]),
        (["size.num_heads=3"], ["num_heads=3 must divide d_model=64"]),
        (["+arch.model.foo=1"], ["Unknown key of arch.model"]),
    ],
    ids=str,
)
def test_the_cost_card_of_a_mistake(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from harness.cost import main

    code = main(arguments)
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert word in err


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "blank", "binary", "latin1", "short", "two"])
def test_a_data_folder_that_cannot_serve(
    kind: str, quick_command: Command, tiny: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    line = "A sentence of the project's own, and no more.\n"
    if kind == "missing":
        folder.rmdir()
    elif kind == "file":
        folder.rmdir()
        folder.write_text(line)
    for index in range({"binary": 5, "latin1": 5, "short": 5, "two": 2}.get(kind, 0)):
        (folder / f"{index}.txt").write_text(line if kind == "short" else line * 200)
    if kind == "blank":
        (folder / "0.txt").write_text("")
        (folder / "1.txt").write_text(" \n" * 200)
    elif kind == "binary":
        (folder / "3.txt").write_bytes(b"\x7fELF\0\0\0")
    elif kind == "latin1":
        (folder / "3.txt").write_bytes("Müll ".encode("latin-1") * 100)
    words = {
        "missing": "does not exist",
        "file": "is a file",
        "empty": "holds no file with text",
        "blank": "holds no file with text",
        "binary": "3.txt is a binary file",
        "latin1": "3.txt is not UTF-8 text",
        "short": "Use shorter contexts or longer documents",
        "two": "at least 3",
    }
    kept = [o for o in tiny if not o.startswith("data.path")]
    result = quick_command(*kept, f"data.path={folder}", f"output={tmp_path / 'o'}")
    assert_one_sentence(result, [words[kind]])
    assert not list(tmp_path.rglob("*.jsonl"))


def test_documents_shorter_than_the_context_of_a_task(
    quick_command: Command, tiny: list[str], tiny_tasks: list[str], tmp_path: Path
) -> None:
    for override in (
        "tasks.perplexity.context_lengths_tokens=[1000000]",
        "tasks.needle.lengths_tokens=[1000000]",
    ):
        key = override.partition("=")[0]
        kept = [o for o in tiny_tasks if not o.startswith(key)]
        result = quick_command(*tiny, *kept, override, f"output={tmp_path / 'o'}")
        assert_one_sentence(result, ["longest", "100000"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there(quick_command: Command, tiny: list[str], tmp_path: Path) -> None:
    result = quick_command(*tiny, "device=cuda", f"output={tmp_path / 'o'}")
    assert_one_sentence(result, ["torch sees no CUDA device here", "device=cpu"])


@pytest.mark.parametrize("experiment", [[], ["experiment=smoke"]], ids=["job", "sweep"])
def test_an_output_folder_that_cannot_be_written(
    experiment: list[str], quick_command: Command, tiny: list[str], tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    for output in (blocked, blocked / "below"):
        result = quick_command(*experiment, *tiny, f"output={output}")
        lines = [line for line in result.err.splitlines() if "jobs, results in" not in line]
        assert_one_sentence(
            result._replace(err="\n".join(lines)), [str(blocked), "choose another output=DIR"]
        )
    assert blocked.read_text() == "in the way"


def test_a_records_file_that_cannot_be_written(
    quick_command: Command, tiny: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "o"
    output.mkdir()
    (output / "records").write_text("in the way")
    result = quick_command(*tiny, "task=[]", f"output={output}")
    assert_one_sentence(result, [str(output / "records"), "choose another output=DIR"])


def test_a_cache_folder_that_cannot_be_written(
    quick_command: Command, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LONGARCH_CACHE", str(tmp_path / "file"))
    result = quick_command(*tiny, "task=[]", f"output={tmp_path / 'o'}")
    assert_one_sentence(result, ["LONGARCH_CACHE"])
