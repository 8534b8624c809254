"""A published checkpoint's folder becomes a `HuggingFaceModel`: safetensors alone, and no code of its own."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from archs.pretrained.folder import CONFIG, HUB, local_folder, one_line, read_json, tensor_files
from archs.pretrained.transformers_model import HuggingFaceModel


def huggingface_model(*, path: str, vocab_size: int, implementation: Mapping[str, str]) -> HuggingFaceModel:
    """Return the model of conf/arch/huggingface.yaml, in float32 on torch's default device.

    path:           a folder with config.json and safetensors files, or hub:OWNER/NAME or
                    hub:OWNER/NAME@REVISION on the Hugging Face hub.
    vocab_size:     of the data; must be the model's own, for a token is a row of its embedding.
    implementation: operation -> the name of its implementation; that of attention counts.

    Code from the folder is never run, and pickles are never read. The folder is kept as `checkpoint`. Raises
    ValueError, one sentence, where transformers is not installed, the hub is out of reach, a file is missing
    or damaged, transformers does not know the model, a tensor is missing or left over, or the vocabularies
    differ.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(
            "arch=huggingface needs the package transformers, which is not installed; "
            "run pip install 'longarch[huggingface]', or use arch=pretrained for a model that we implement."
        )
    folder = local_folder(path)
    if not folder.is_dir() or not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} holds no {CONFIG}; give the folder of a whole checkpoint.")
    values = read_json(folder / CONFIG)
    tensor_files(folder)
    try:
        with _quiet():
            model = HuggingFaceModel(_load(folder, values), implementation=implementation["attention"])
    except (ValueError, OSError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(f"{folder}: {one_line(error)}.") from None
    if vocab_size != model.vocab_size:
        tokenizer = path.removeprefix(HUB).partition("@")[0]
        raise ValueError(
            f"data.vocab_size={vocab_size} is not the vocabulary of {path}, {model.vocab_size} with its "
            f"padding: read the text in the model's own tokens, data.tokenizer={tokenizer} (or where its "
            f"tokenizer.json is) and data.vocab_size={model.vocab_size}."
        )
    model.checkpoint = str(folder)
    return model


def _load(folder: Path, values: Mapping[str, Any]) -> nn.Module:
    """transformers' own model; its weights are read unless torch's default device is "meta"."""
    transformers = importlib.import_module("transformers")
    names = importlib.import_module("transformers.models.auto.modeling_auto")
    kind = values.get("model_type")
    if kind not in names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"model_type={kind!r} is not a causal language model that transformers "
            f"{transformers.__version__} brings with it, and code from a folder is never run"
        )
    if values.get("quantization_config") is not None:
        raise ValueError("its weights are quantized, which is not supported; give it in floating point")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    auto = transformers.AutoModelForCausalLM
    if torch.get_default_device().type == "meta":
        model = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
        # Of the forms that a mixture of experts has, the one that counts no tokens works without data.
        if hasattr(config, "num_experts_per_tok"):
            model.set_experts_implementation("batched_mm")
        return model
    model, found = auto.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    wrong = [f"missing {name}" for name in sorted(found["missing_keys"])]
    wrong += [f"unexpected {name}" for name in sorted(found["unexpected_keys"])]
    if wrong:
        raise ValueError(
            f"the tensors do not fit {CONFIG} ({'; '.join(wrong)}); "
            f"use the {CONFIG} that belongs to the weights"
        )
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars and advice of transformers off the terminal while a model is built."""
    logging = importlib.import_module("transformers.utils.logging")
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
