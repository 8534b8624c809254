"""Published checkpoints: a folder with config.json and safetensors files becomes a Decoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from archs.decoder import Decoder
from archs.ops.operation import Operation
from archs.pretrained.config import Published, read_published
from archs.pretrained.folder import (
    CONFIG,
    HUB,
    WEIGHTS,
    local_folder,
    one_line,
    read_json,
    read_tensors,
    tensor_files,
    tensor_shapes,
)

FLOATS = ("F64", "F32", "F16", "BF16")

# Tables of angles that older files hold beside the weights; rope_theta says the same.
DERIVED = ".rotary_emb.inv_freq"


def load_pretrained(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Decoder:
    """Return the model of a published checkpoint, in eval mode on `device` in `dtype`.

    folder: holds config.json and model.safetensors, or shards with model.safetensors.index.json. The
            architecture is that of config.json's model_type (llama, mistral, qwen2, mamba, mamba2, ttt),
            or Mamba or Mamba-2 in the layout of state-spaces/mamba. See `archs.pretrained.config`.

    Every tensor must find its place and every place its tensor. On the device "meta" names and shapes
    are checked and no weight is read. Raises ValueError, one sentence that says what to do, where a file
    is missing or damaged, a setting is not supported, or tensors are missing, unexpected or of another
    shape, all of them listed.
    """
    folder = Path(folder)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} must be a floating-point one.")
    published = _read_config(folder)
    files = tensor_files(folder)
    try:
        with torch.device("meta"):
            model = Decoder(**published.decoder).eval()
    except (ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{folder / CONFIG}: {one_line(error)}.") from None
    sources = _match(folder, model, published, files)
    if torch.device(device).type == "meta":
        return model.to(dtype)
    for path in sorted(set(files.values())):
        wanted = {ours: name for ours, name in sources.items() if files[name] == path}
        for ours, tensor in read_tensors(path, wanted):
            _put(model, ours, tensor.to(device=device, dtype=dtype))
    if published.decoder["is_tied"]:
        model.head.weight = model.embedding.weight
    return model


def pretrained_model(*, path: str, vocab_size: int, implementation: Mapping[str, str]) -> Decoder:
    """Return the model of conf/arch/pretrained.yaml, built on torch's default device.

    path:           a folder, or hub:OWNER/NAME or hub:OWNER/NAME@REVISION on the Hugging Face hub.
    vocab_size:     of the data; must be the model's own, for a token is a row of its embedding.
    implementation: operation -> the name of its implementation; a step's may be left out.

    The folder is kept as `checkpoint`. Raises ValueError as `load_pretrained`, where the hub or its
    package is out of reach, and where the vocabularies differ.
    """
    folder = local_folder(path)
    model = load_pretrained(folder, device=torch.get_default_device())
    if vocab_size != model.vocab_size:
        tokenizer = path.removeprefix(HUB).partition("@")[0]
        raise ValueError(
            f"data.vocab_size={vocab_size} is not the vocabulary of {path}, {model.vocab_size} with its "
            f"padding: read the text in the model's own tokens, data.tokenizer={tokenizer} (or where its "
            f"tokenizer.json is) and data.vocab_size={model.vocab_size}."
        )
    for module in model.modules():
        operation = getattr(module, "operation", None)
        if isinstance(operation, Operation):
            module.implementation = implementation[operation.name]
        step_operation = getattr(module, "step_operation", None)
        if isinstance(step_operation, Operation):
            module.step_implementation = implementation.get(step_operation.name)
    model.checkpoint = str(folder)
    return model


def _read_config(folder: Path) -> Published:
    path = folder / CONFIG
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one with {CONFIG} and {WEIGHTS}.")
    if not path.is_file():
        raise ValueError(f"{folder} holds no {CONFIG}; give the folder of a whole checkpoint.")
    values = read_json(path)
    try:
        return read_published(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from None


def _match(folder: Path, model: Decoder, published: Published, files: Mapping[str, Path]) -> dict[str, str]:
    """Our name -> name in the files of every parameter, a tied head not among them. Raises ValueError
    that lists everything that does not fit."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for path in set(files.values()):
        found |= tensor_shapes(path)
    spelled = {published.aliases.get(name, name): name for name in found}
    unused = {name for name in found if not name.endswith(DERIVED)}
    sources, wrong = {}, []
    for ours, parameter in model.state_dict().items():
        name = published.name(ours)
        if name not in spelled:
            sources[ours] = ""
            continue
        sources[ours] = name = spelled[name]
        unused.discard(name)
        shape, dtype = found[name]
        if shape != tuple(parameter.shape):
            wrong.append(f"{name} has shape {shape} instead of {tuple(parameter.shape)}")
        if dtype not in FLOATS:
            wrong.append(f"{name} holds {dtype} instead of floating-point numbers")
    if published.decoder["is_tied"]:
        head = sources.pop("head.weight")
        if not sources["embedding.weight"]:  # a shared tensor is saved once, under either name
            sources["embedding.weight"] = head
        elif head and not wrong and not _are_equal(files, sources["embedding.weight"], head):
            wrong.append(f"{head} differs from {sources['embedding.weight']}, to which config.json ties it")
    wrong = [
        *(f"missing {published.name(ours)}" for ours, name in sources.items() if not name),
        *(f"unexpected {name}" for name in sorted(unused)),
        *wrong,
    ]
    if wrong:
        raise ValueError(
            f"the tensors in {folder} do not fit its {CONFIG} ({'; '.join(wrong)}); "
            "use the config.json that belongs to the weights."
        )
    return sources


def _are_equal(files: Mapping[str, Path], first: str, second: str) -> bool:
    a, b = (next(read_tensors(files[name], {"": name}))[1] for name in (first, second))
    return torch.equal(a, b)


def _put(model: Decoder, name: str, tensor: Tensor) -> None:
    """Set a parameter, keeping what training knows of it (`archs.layers.undecayed`)."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    parameter = nn.Parameter(tensor)
    vars(parameter).update(vars(getattr(module, attribute)))
    setattr(module, attribute, parameter)
