"""Sizes of the papers: the published models to the parameter, and the others matched to a Transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.config.build import build_model, checked_job
from harness.config.match import MATCH_TOLERANCE, is_published, matched_model_config, mismatch_text
from harness.cost import main
from harness.run.cost_card import meta_model
from tests.conftest import TRAINED, compose_job
from tests.conftest import compose_resolved as compose

#: arXiv 2312.00752 and 2405.21060 (vocabularies 50280 and 50288, tied), and 2407.04620 with its Mamba
#: backbone (32000, tied): counted on the published code.
PUBLISHED = {
    ("mamba", "130m"): 129_135_360,
    ("mamba", "370m"): 371_516_416,
    ("mamba", "790m"): 793_204_224,
    ("mamba", "1.4b"): 1_372_178_432,
    ("mamba", "2.8b"): 2_768_345_600,
    ("mamba2", "130m"): 128_989_632,
    ("ttt_linear", "125m"): 110_424_144,
    ("ttt_linear", "350m"): 337_684_224,
    ("ttt_linear", "760m"): 733_608_192,
    ("ttt_linear", "1.3b"): 1_285_639_296,
    ("ttt_mlp", "125m"): 114_589_776,
    ("ttt_mlp", "350m"): 348_792_576,
    ("ttt_mlp", "760m"): 758_528_256,
    ("ttt_mlp", "1.3b"): 1_307_856_000,
}
CONF = Path(__file__).resolve().parent.parent / "conf"
SIZES = sorted(path.stem for path in (CONF / "size").glob("*.yaml") if path.stem[0].isdigit())


@pytest.mark.parametrize(("arch", "size"), PUBLISHED)
def test_a_published_model_has_the_published_parameters(arch: str, size: str) -> None:
    config = compose_job(f"arch={arch}", f"size={size}")
    model, mismatch = meta_model(config)
    reference = build_model(config.reference.model, "meta").num_parameters
    assert model.num_parameters == PUBLISHED[arch, size] and is_published(config)
    assert mismatch == pytest.approx(PUBLISHED[arch, size] / reference - 1, abs=1e-12)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_published_model_says_how_far_it_is_from_the_transformer() -> None:
    """What is never matched may be beyond the tolerance, and the records have to show it."""
    config = compose_job("arch=ttt_mlp", "size=125m")
    mismatch = matched_model_config(config)[1]
    assert mismatch == pytest.approx(0.046, abs=5e-4) and mismatch > MATCH_TOLERANCE
    text = mismatch_text(mismatch, is_published=is_published(config))
    assert (
        text
        == f"parameters {mismatch:+.2%} against the reference; published as it is, and nothing is matched."
    )
    itself = compose_job("arch=mamba", "arch@reference=mamba", "size=130m")
    assert matched_model_config(itself)[1] is None
    assert matched_model_config(compose_job("arch=mamba", "size=130m", "match=none"))[1] is None


def test_every_published_size_of_the_configuration_is_checked_above() -> None:
    sizes = {arch: compose(f"arch={arch}")["arch"].get("published", ()) for arch in TRAINED}
    named = {(arch, size) for arch in TRAINED for size in sizes[arch]}
    assert named == set(PUBLISHED)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["arch=mamba", "size=130m", "arch.model.num_layers=4"], "arch.published_model.num_layers"),
        (["arch=mamba2", "size=125m", "++arch.model.mixers=[]"], "arch.published_model.mixers"),
        (["arch=mamba", "size=130m", "~arch.model.d_ff"], "arch.published_model.d_ff"),
        (["arch@reference=mamba", "size=130m", "reference.model.d_ff=8"], "reference.published_model.d_ff"),
        (["arch=mamba", "arch.published_model.num_layers=4"], "arch.model.num_layers"),
    ],
)
def test_an_override_of_the_model_that_the_size_leaves_out_is_an_error(
    overrides: list[str], words: str
) -> None:
    with pytest.raises(ValueError, match=rf"changes nothing at size=.*; set {words} instead"):
        compose(*overrides)


def test_an_override_of_the_model_that_the_size_takes_holds() -> None:
    for overrides, num_layers in (
        (("arch=mamba", "size=130m", "arch.published_model.num_layers=3"), 3),
        (("arch=mamba", "size=tiny", "arch.model.num_layers=5"), 5),
        (("arch=ttt_mlp", "size=125m", "arch.model.num_layers=6"), 6),
    ):
        assert compose(*overrides)["arch"]["model"]["num_layers"] == num_layers


@pytest.mark.parametrize("arch", ["mamba", "mamba2"])
@pytest.mark.parametrize("size", ["130m", "125m"])
def test_the_layer_starts_as_published_at_every_size_of_a_paper(arch: str, size: str) -> None:
    small, large = (compose(f"arch={arch}", f"size={s}")["arch"]["model"] for s in ("tiny", size))
    (mixer,), (small_mixer,) = large["mixers"], small["mixers"]
    assert not any(key.startswith("start_") for key in mixer)
    assert any(key.startswith("start_") for key in small_mixer)
    assert mixer["state_width"] == {"mamba": 16, "mamba2": 128}[arch]
    assert large["num_layers"] == 24


@pytest.mark.parametrize(
    ("arch", "size"),
    [(arch, "125m") for arch in TRAINED if (arch, "125m") not in PUBLISHED]
    + [("titans_mag", "350m"), ("hybrid", "1.3b"), ("mamba2", "2.8b"), ("ttt_mlp", "130m")],
)
def test_the_others_are_matched_to_the_transformer_of_the_size(arch: str, size: str) -> None:
    config = compose_job(f"arch={arch}", f"size={size}")
    model_config, mismatch = matched_model_config(config)
    if config.arch.match is None:
        assert model_config == config.arch.model
    else:
        assert mismatch is not None and abs(mismatch) <= MATCH_TOLERANCE
        assert 0 <= model_config["vocab_size"] - config.reference.model["vocab_size"] < 16
        assert model_config["d_ff"] >= 8 or arch.startswith("mamba")


@pytest.mark.parametrize("size", SIZES)
def test_the_transformer_has_the_size_it_is_named_after(size: str) -> None:
    """Within 15%, as the papers round: TTT's 125M is 110M with 32,000 tokens."""
    number = float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
    count = build_model(compose(f"size={size}")["arch"]["model"], "meta").num_parameters
    assert count == pytest.approx(number, rel=0.15)


def test_more_tokens_than_the_size_has_rows_for_is_an_error() -> None:
    config: dict[str, Any] = compose("size=125m", "data.vocab_size=50000")
    with pytest.raises(ValueError, match=r"data.vocab_size=50000 is more than the 32000 tokens .*size=125m"):
        checked_job(config)


def test_the_card_says_the_count(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["arch=mamba", "size=2.8b"]) == 0
    out = capsys.readouterr().out
    assert "Mamba: 2,768,345,600 parameters" in out
    assert "parameters +4.59% against the reference; published as it is" in out
