"""The rendered page: what it shows, that it is whole, and that it needs nothing from outside."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from math import log
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from harness.record.schema import Point
from reports.__main__ import main
from reports.draw.style import log_ticks
from reports.page.html import render
from reports.results.load import ReportError, load
from tests.reports.parsed_page import Page

#: With the fixture's records every one of these is drawn.
PICTURES = (
    *("bits_per_byte_by_context", "loss_by_position", "needle_by_context", "needle_log_probability"),
    *("needle_heat_maps", "prefill_batch1", "decode_batch1", "memory_batch1", "state_batch1"),
    *("predicted_state", "flops", "quality_prefill", "quality_decode", "quality_flops", "needle_state"),
    *("training_loss", "validation_loss", "learning_rate_search"),
)


@pytest.fixture(scope="module")
def page(rendered: Any) -> Page:
    return Page(rendered.text)


def test_nothing_comes_from_outside(rendered: Any, page: Page) -> None:
    without_figures = re.sub(r"data:[^\"]*", "", rendered.text)
    assert not re.search(r"//[a-z]|@import|url\(|<script", without_figures, re.IGNORECASE)
    for _, attributes in page.elements:
        for name in ("src", "href"):
            value = attributes.get(name) or "#"
            is_inside = value.startswith(("data:", "#")) or (rendered.page.parent / value).is_file()
            assert is_inside, value[:60]
    for attributes in page.attributes("img"):
        svg = base64.b64decode((attributes["src"] or "").split(",")[1]).decode()
        links = re.findall(r'(?:href|src)="([^"]*)"', svg)
        assert svg.startswith("<svg") and all(link.startswith(("#", "data:")) for link in links)
        assert "<script" not in svg


def test_every_figure_is_on_the_page_and_beside_it_at_print_quality(rendered: Any, page: Page) -> None:
    assert {path.stem for path in rendered.page.parent.glob("*.png")} == set(PICTURES)
    for name in PICTURES:
        content = (rendered.page.parent / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG") and f'href="{name}.png"' in rendered.text
        assert int.from_bytes(content[16:20], "big") >= 1000  # pixels across
        pixels_per_metre = int.from_bytes(content[content.index(b"pHYs") + 4 :][:4], "big")
        assert pixels_per_metre * 0.0254 >= 200
    assert all(attributes.get("alt") for attributes in page.attributes("img"))
    assert len(page.attributes("img")) == len(PICTURES) - 1 + 13  # heat maps are a panel each


def test_ids_are_unique_and_links_within_the_page_hold(page: Page) -> None:
    assert len(page.ids) == len(set(page.ids))
    anchors = [a["href"] for a in page.attributes("a") if (a["href"] or "").startswith("#")]
    assert len(anchors) >= 9 and all((anchor or "")[1:] in page.ids for anchor in anchors)


def test_it_fits_a_phone_and_a_keyboard(page: Page) -> None:
    assert any(a.get("name") == "viewport" for a in page.attributes("meta"))
    assert page.attributes("html")[0]["lang"] == "en"
    regions = [a for a in page.attributes("div") if a.get("class") == "scroll"]
    assert len(regions) == len(page.attributes("table"))
    assert all(region["tabindex"] == "0" and region["aria-labelledby"] in page.ids for region in regions)


def test_one_name_and_one_colour_an_architecture(builder: ModuleType, rendered: Any, page: Page) -> None:
    ranking = [row[1].strip() for row in page.tables["ranking"][1:]]
    assert sorted(ranking) == sorted(entry[0] for entry in builder.ARCHITECTURES.values())
    swatches = re.findall(r'style="background:(#\w{6})"></span>([^<]+)</span>', rendered.text)
    assert len(swatches) > 50
    expected = {entry[0]: entry[1] for entry in builder.ARCHITECTURES.values()}
    assert {name: colour for colour, name in swatches} == expected
    assert len(set(swatches)) == len(expected)


def test_failures_are_named_with_their_reasons(page: Page, rendered: Any) -> None:
    rows = [" ".join(row) for row in page.tables["failures"][1:]]
    assert len([row for row in rows if "Titans MAL" in row]) == 3
    assert any("diverged" in row and "<NaN> at step 17" in row for row in rows)
    (needle,) = [row for row in rows if "out of memory" in row]
    assert "Transformer" in needle and "5 cells" in needle and "4096" in needle and "needed 3 GiB" in needle
    assert any("LSTM" in row and "timed out" in row and "60 s" in row for row in rows)
    assert "<NaN>" not in rendered.text  # escaped, not markup
    panels = [a["alt"] or "" for a in page.attributes("img")]
    assert any(alt.startswith("Transformer:") and "4,096 tokens OOM" in alt for alt in panels)


def test_damaged_lines_are_counted_and_shown(rendered: Any) -> None:
    assert "could not be read and are not in this report: 1;" in rendered.text
    assert "latency.jsonl, line 263: not a record" in rendered.text


def test_crossovers_are_those_of_the_records(builder: ModuleType, page: Page, rendered: Any) -> None:
    header, *rows = page.tables["crossovers"]
    column = next(
        index for index, cell in enumerate(header) if cell.split() == ["Decode", "time", "batch", "1"]
    )
    found = {row[0].strip(): row[column] for row in rows}
    # Mamba decodes in 0.7 ms, the Transformer in 0.328 + context/2500: between 512 and 1024 tokens.
    low, high = 0.328 + 512 / 2500, 0.328 + 1024 / 2500
    share = log(0.7 / low) / log(high / low)
    assert found["Mamba"].split()[:3] == ["less", "from", f"{round(512 * 2**share):,}"]
    assert "512 to 1,024" in found["Mamba"]
    assert "always more" in found["Transformer²"] and "Transformer" not in found
    assert "interpolated" in rendered.text


def test_environment_command_and_configuration_are_there(
    builder: ModuleType, page: Page, rendered: Any
) -> None:
    facts = {row[0].strip(): row[1].strip() for row in page.tables["environment"][1:]}
    assert facts["CPU"] == "Example CPU 9000" and facts["GPU"] == "none" and facts["PyTorch"] == "2.13.0"
    assert facts["Git commit"] == "0123abc"
    assert builder.COMMAND in rendered.text
    assert rendered.text.count("configuration hash-") == 14  # 13 architectures and the latency job


def test_notes_name_chance_intervals_and_sample_counts(rendered: Any) -> None:
    for words in ("chance is 0.01%", "Wilson", "bootstrap", "20 examples per cell", "40 documents"):
        assert words in rendered.text


def test_dispatch_is_shown_apart(page: Page) -> None:
    rows = page.tables["dispatch"][1:]
    assert len(rows) == 20 and all("Transformer²" in row[3] for row in rows)
    assert all(row[-1].strip() == "0.40" for row in rows)


def test_the_same_records_make_the_same_page(builder: ModuleType, tmp_path: Path) -> None:
    folder = builder.write_experiment(tmp_path / "a", archs=("mamba",), change=_small)
    pages = [render([folder], tmp_path / name).read_bytes() for name in ("x", "y")]
    assert pages[0] == pages[1]


def _small(point: Point) -> Point | None:
    return point if point.task in ("train", "cost") else None


def test_words_from_the_records_are_escaped(builder: ModuleType, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    config = {"arch": {"name": "mamba", "display_name": evil, "colour": "red;}</style>" + evil}, "x": evil}
    folder = builder.write_experiment(
        tmp_path,
        archs=("mamba",),
        change=lambda point: _small(replace(point, details={**point.details, "dtype": evil})),
        config=config,
        command=evil,
        environment={evil: evil},
        job=evil,
    )
    text = render([folder], tmp_path / "report").read_text()
    assert "<script" not in text and "&lt;script&gt;" in text


def test_two_machines_and_uncommitted_changes_are_pointed_out(builder: ModuleType, tmp_path: Path) -> None:
    one = builder.write_experiment(tmp_path / "a", archs=("mamba",), change=_small)
    environment = {**builder.ENVIRONMENT, "cpu_name": "Another", "is_dirty": True}
    two = builder.write_experiment(
        tmp_path / "b", archs=("hybrid",), change=_small, tag="b", environment=environment
    )
    text = render([one, two], tmp_path / "report").read_text()
    assert "2 different machines" in text and "uncommitted changes" in text
    assert "Example CPU 9000 (1 runs); Another (1 runs)" in text


@pytest.mark.parametrize("num_workers", [1, 2])
def test_training_beside_other_work_is_pointed_out(
    num_workers: int, builder: ModuleType, tmp_path: Path
) -> None:
    config = {"num_workers": num_workers}
    folder = builder.write_experiment(tmp_path, archs=("mamba",), change=_small, config=config)
    text = render([folder], tmp_path / "report").read_text()
    assert ("Up to 2 models trained and were tested at once" in text) == (num_workers == 2)


def test_a_machine_that_timed_nothing_is_not_warned_of(builder: ModuleType, tmp_path: Path) -> None:
    def without_times(point: Point) -> Point | None:
        return _small(replace(point, metrics={"mixture_loss_nats": 1.0}, samples={}))

    one = builder.write_experiment(tmp_path / "a", archs=("mamba",), change=_small)
    environment = {**builder.ENVIRONMENT, "cpu_name": "Another"}
    two = builder.write_experiment(
        tmp_path / "b", archs=("hybrid",), change=without_times, tag="b", environment=environment
    )
    text = render([one, two], tmp_path / "report").read_text()
    assert "different machines" not in text and "Another (1 runs)" in text


def test_whatever_is_missing_is_said(builder: ModuleType, tmp_path: Path) -> None:
    folder = builder.write_experiment(
        tmp_path, archs=("hybrid",), change=lambda point: point if point.task == "needle" else None
    )
    text = render([folder], tmp_path / "report").read_text()
    for words in ("No perplexity was measured", "No cost was measured", "Nothing was trained"):
        assert words in text
    assert "Every cell that was tried gave a number" in text


@pytest.mark.parametrize("peak", [None, 0])
def test_memory_that_was_not_seen_is_not_drawn(builder: ModuleType, tmp_path: Path, peak: int | None) -> None:
    def change(point: Point) -> Point | None:
        is_kept = point.task == "latency" and point.cell["context_tokens"] <= 512
        return replace(point, metrics={**point.metrics, "peak_memory_bytes": peak}) if is_kept else None

    folder = builder.write_experiment(tmp_path, archs=("mamba", "transformer"), change=change)
    page = render([folder], tmp_path / "report")
    assert (page.parent / "prefill_batch1.png").is_file()
    assert not (page.parent / "memory_batch1.png").exists()
    assert ("Peak memory was not recorded" in page.read_text()) == (peak is None)


def test_figures_of_an_earlier_report_do_not_stay_beside_a_new_one(
    builder: ModuleType, tmp_path: Path
) -> None:
    output = tmp_path / "report"
    before = builder.write_experiment(tmp_path / "a", archs=("mamba",), change=_small)
    render([before], output)
    (output / "my_own.png").write_bytes(b"x")
    assert (output / "training_loss.png").is_file()
    after = builder.write_experiment(
        tmp_path / "b", archs=("mamba",), change=lambda point: point if point.task == "cost" else None
    )
    render([after], output)
    assert {path.name for path in output.glob("*.png")} == {"flops.png", "predicted_state.png", "my_own.png"}


def test_a_run_in_which_everything_failed_has_a_report(builder: ModuleType, tmp_path: Path) -> None:
    folder = builder.write_experiment(
        tmp_path, archs=("mamba", "hybrid"), change=lambda point: builder.failed(point, "crashed", "segfault")
    )
    text = render([folder], tmp_path / "report").read_text()
    assert "segfault" in text and "crashed" in text


def test_the_command_writes_beside_the_first_folder(
    builder: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = builder.write_experiment(tmp_path / "a", archs=("mamba",), change=_small)
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report" / "index.html")
    assert main([str(folder), "--output", str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "elsewhere" / "index.html").is_file()


def test_nothing_to_report_is_one_sentence_and_status_2(
    builder: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    folder = builder.write_experiment(tmp_path / "a", archs=("mamba",), change=_small)
    for arguments in (
        [str(tmp_path / "none")],
        [str(tmp_path)],
        [str(folder), "--output", str(tmp_path / "file")],
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error


def test_an_output_below_a_file_is_an_error(builder: ModuleType, tmp_path: Path) -> None:
    folder = builder.write_experiment(tmp_path / "a", archs=("mamba",), change=_small)
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="cannot be written"):
        render([folder], tmp_path / "file" / "below")
    assert load([folder]).points


@pytest.mark.parametrize("is_binary", [False, True])
@pytest.mark.parametrize(
    ("low", "high"), [(0.3, 2.4), (29e6, 45e6), (64.0, 2.0**40), (1e-4, 9e5), (0.98, 1.02)]
)
def test_logarithmic_axes_have_a_few_ticks_in_range(low: float, high: float, is_binary: bool) -> None:
    ticks = log_ticks(low, high, is_binary=is_binary)
    assert 2 <= len(ticks) <= 9 and low <= min(ticks) and max(ticks) <= high
