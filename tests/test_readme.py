"""The README: its example runs, its numbers are the published ones, its links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from omegaconf import OmegaConf

from archs.base import state_bytes
from archs.decoder import Decoder
from reports.results.load import Results, load

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
TEXTS = [
    path
    for path in REPOSITORY.rglob("README.md")
    if ".venv" not in path.parts and "outputs" not in path.parts
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def decay(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    path = tmp_path_factory.mktemp("example") / "decay.py"
    path.write_text(blocks("python")[1])
    spec = importlib.util.spec_from_file_location("decay", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_architecture_keeps_the_contract(decay: ModuleType) -> None:
    torch.manual_seed(0)
    model = Decoder(vocab_size=11, d_model=8, num_layers=2, d_ff=16, mixers=[decay.Decay]).double()
    tokens = torch.randint(0, 11, (2, 13))
    whole, state = model(tokens), model.init_state(2, 13)
    assert state_bytes(state) == model.state_bytes_at(2, 13)
    first, state = model.prefill(tokens[:, :6], state, num_logits=6)
    steps = []
    for token in tokens[:, 6:].unbind(1):
        logits, state = model.decode(token, state)
        steps.append(logits)
    torch.testing.assert_close(torch.cat((first, torch.stack(steps, 1)), 1), whole, rtol=0, atol=1e-9)


def test_the_examples_yaml_has_what_an_architectures_yaml_has() -> None:
    (text,) = blocks("yaml")
    ours = OmegaConf.load(REPOSITORY / "conf" / "arch" / "recurrent.yaml")
    assert set(OmegaConf.create(text)) == set(ours)


def test_the_python_entry_scores_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra `huggingface`")
    sizes = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=1, num_key_value_heads=1)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    code = blocks("python")[0].replace(', tokenizer="FOLDER"', "")  # bytes: the folder has no tokenizer
    code = code.replace('"FOLDER"', repr(str(tmp_path))).replace(
        '"BOOKS"', repr(str(REPOSITORY / "tests/corpus"))
    )
    exec(compile(code.replace("1024", "64"), "README.md", "exec"), {})
    assert 5 < float(capsys.readouterr().out) < 12, "random weights are near 8 bits per byte"


@pytest.fixture(scope="module")
def results() -> Results:
    return load([REPOSITORY / "reports" / "published" / "cpu_small"])


def test_the_headline_table_shows_the_published_records(results: Results) -> None:
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in README.splitlines() if "KiB |" in line
    ]
    names = {series.label: series.key for series in results.series}
    assert {row[0] for row in rows} == set(names)

    def value(key: tuple[str, str], task: str, metric: str, **cell: object) -> list[float]:
        points = [p for p in results.ok(task) if (p.arch, p.size) == key and cell.items() <= p.cell.items()]
        return [float(point.metrics[metric]) for point in points]

    for name, *shown in rows:
        key = names[name]
        for text, length in zip(shown[:3], (128, 512, 2048), strict=True):
            accuracies = value(key, "needle", "accuracy", context_tokens=length)
            assert len(accuracies) == 5 and text == f"{sum(accuracies) / 5:.0%}", (name, length)
        (bits,) = value(key, "perplexity", "bits_per_byte", context_tokens=4096)
        assert shown[3] == f"{bits:.2f}", name
        for text, phase, digits in ((shown[4], "prefill", 0), (shown[5], "decode", 2)):
            (time_ms,) = value(key, "latency", "median_ms", context_tokens=16384, phase=phase)
            assert text == f"{time_ms:.{digits}f} ms", name
        (num_bytes, _) = value(key, "latency", "state_bytes", context_tokens=16384)
        assert shown[6] == f"{num_bytes / 1024:,.0f} KiB", name


@pytest.mark.parametrize("path", TEXTS, ids=[str(path.relative_to(REPOSITORY)) for path in TEXTS])
def test_links_lead_to_files(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    missing = [t for t in targets if "://" not in t and not (path.parent / t).exists()]
    assert missing == []
