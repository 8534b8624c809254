"""Shared by all tests: composed configurations and models of every architecture in conf/arch."""

from __future__ import annotations

import atexit
import copy
import gc
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from archs.base import SequenceModel
from harness.config.build import build_model, resolve
from harness.config.compose import compose_config
from harness.config.match import matched_model_config
from harness.config.schema import JobConfig, parse_job

REPOSITORY = Path(__file__).resolve().parent.parent
ARCHITECTURES = sorted(path.stem for path in (REPOSITORY / "conf" / "arch").glob("*.yaml"))


def pytest_configure() -> None:
    """Without a GPU our Triton kernels run in Triton's interpreter, which is decided where one is defined."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="session")
def _triton_looks_through_its_language_once_a_launch() -> Iterator[None]:
    """Its interpreter replaces the functions of triton.language at a launch. It looks for them again at every
    call of a device function, which takes a quarter of the time, and finds none but at the first call of one
    of the language's own."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
            from triton import language
            from triton.runtime import interpreter

            replace = interpreter._patch_lang

            def replace_once(function: Callable[..., Any]) -> Any:
                seen = [v for v in function.__globals__.values() if v is language or v is language.core]
                is_known = seen and not any(language.core.is_builtin(module.load) for module in seen)
                return interpreter._LangPatchScope() if is_known else replace(function)

            patch.setattr(interpreter, "_patch_lang", replace_once)
        yield


@pytest.fixture(autouse=True, scope="module")
def _only_new_objects_are_looked_at() -> None:
    """Whatever measures memory collects garbage first, which takes half a second for all that the tests so
    far have imported."""
    gc.collect()
    gc.freeze()


def is_pretrained(arch: str) -> bool:
    """Whether an entry of conf/arch reads a checkpoint, and so has sizes of its own and needs a path."""
    return "path: ???" in (REPOSITORY / "conf" / "arch" / f"{arch}.yaml").read_text()


#: Those that are trained here.
TRAINED = [arch for arch in ARCHITECTURES if not is_pretrained(arch)]

#: What an entry of conf/arch that reads a checkpoint needs: its folder, and its vocabulary for the data's.
CHECKPOINT = (f"arch.path={REPOSITORY / 'tests' / 'goldens' / 'llama'}", "data.vocab_size=96")


def needed_overrides(arch: str) -> list[str]:
    """What must be said beside arch=NAME."""
    if not is_pretrained(arch):
        return []
    text = (REPOSITORY / "conf" / "arch" / f"{arch}.yaml").read_text()
    return list(huggingface_checkpoint() if "archs.pretrained.transformers_" in text else CHECKPOINT)


@cache
def huggingface_checkpoint() -> tuple[str, ...]:
    """As CHECKPOINT, of a model that we do not implement: a small random GPT-NeoX, made by transformers."""
    transformers = pytest.importorskip("transformers", reason="needs the extra `huggingface`")
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(**sizes, num_attention_heads=2, bos_token_id=0, eos_token_id=0)
    transformers.GPTNeoXForCausalLM(config).save_pretrained(folder.name)
    return f"arch.path={folder.name}", "data.vocab_size=96"


def compose_resolved(*overrides: str) -> dict[str, Any]:
    """The resolved configuration of a command line."""
    return copy.deepcopy(_composed_once(*overrides))


def compose_job(*overrides: str) -> JobConfig:
    """The typed configuration of a command line."""
    return parse_job(_composed_once(*overrides))


@cache
def _composed_once(*overrides: str) -> dict[str, Any]:
    return resolve(compose_config(list(overrides)))


def make_model(arch: str, *overrides: str, dtype: torch.dtype = torch.float64) -> SequenceModel:
    """A seeded model of an architecture at size=nano, every parameter moved off its initial value."""
    config = compose_job(f"arch={arch}", "size=nano", "match=none", *needed_overrides(arch), *overrides)
    torch.manual_seed(0)
    model = build_model(matched_model_config(config)[0]).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


@pytest.fixture(scope="session", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> SequenceModel:
    """Every architecture in turn, in float64."""
    return make_model(request.param)


@pytest.fixture(params=ARCHITECTURES)
def arch(request: pytest.FixtureRequest) -> str:
    """The name of every architecture in turn."""
    return request.param


@pytest.fixture(scope="session")
def new_model() -> Callable[..., SequenceModel]:
    """make_model, for tests that need a model of their own."""
    return make_model
