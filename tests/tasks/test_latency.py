"""Latency: the models in turn, raw samples kept, what fails typed and laid at the right model's door."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from archs.base import Flops, Phase, SequenceModel
from harness.measure.turns import TimingRun
from tasks.base import Measurement
from tasks.latency import Latency

CPU = torch.device("cpu")
PREFILL = {"phase": "prefill", "context_tokens": 8, "batch_size": 2}
DECODE = {**PREFILL, "phase": "decode"}


class Recorder(SequenceModel):
    """Does nothing but write its name into a diary, and goes wrong when told to."""

    vocab_size = 257

    def __init__(self, name: str, diary: list[str], fault: Callable[[int], None] | None = None) -> None:
        super().__init__()
        self.name, self.diary, self.fault, self.num_calls = name, diary, fault, 0
        self.chunks: list[int] = []
        self.rooms: list[int] = []
        self.decoded_at: list[tuple[int, float]] = []

    def _happen(self, what: str) -> None:
        self.diary.append(f"{self.name} {what}")
        self.num_calls += 1
        if self.fault is not None:
            self.fault(self.num_calls)

    def init_state(self, batch_size: int, max_context_tokens: int) -> tuple[Tensor, int]:
        self.rooms.append(max_context_tokens)
        return (torch.zeros(batch_size, max_context_tokens), 0)

    def prefill(self, tokens: Tensor, state: Any, num_logits: int = 1) -> tuple[Tensor, Any]:
        self.chunks.append(tokens.shape[1])
        self._happen("prefill")
        logits = torch.zeros(tokens.shape[0], num_logits, self.vocab_size)
        return logits, (state[0], state[1] + tokens.shape[1])

    def decode(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        assert token.shape == (2,)
        self._happen("decode")
        numbers, num_tokens = state
        self.decoded_at.append((num_tokens, float(numbers.sum())))
        numbers[:, num_tokens] += 1  # in place, as a cache is
        return torch.zeros(token.shape[0], self.vocab_size), (numbers, num_tokens + 1)

    def dispatch(self, prompt: Tensor, state: Any) -> Any:
        self._happen("dispatch")
        return state

    def forward(self, tokens: Tensor) -> Tensor:
        raise AssertionError

    def loss(self, tokens: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        raise AssertionError

    def state_bytes_at(self, batch_size: int, context_tokens: int) -> int:
        return 0

    def flops(self, context_tokens: int, phase: Phase) -> Flops:
        return Flops()


def new_task(**changes: Any) -> Latency:
    fields: dict[str, Any] = {
        "context_lengths_tokens": [16, 8],
        "batch_sizes": [1, 2],
        "num_samples": 3,
        "num_decode_steps": 4,
        "max_cell_s": 5.0,
        "chunk_tokens": 64,
    }
    return Latency(**fields | changes)


def run(
    task: Latency,
    models: dict[str, SequenceModel],
    cell: dict[str, Any],
    timing_run: TimingRun | None = None,
) -> dict[str, Any]:
    return dict(task.measure_in_turn(models, cell, timing_run or TimingRun(CPU)))


def test_the_grid_has_both_phases_and_goes_from_short_to_long() -> None:
    cells = new_task().cells()
    assert len(cells) == 2 * 2 * 2 and cells[0] == {"phase": "prefill", "context_tokens": 8, "batch_size": 1}
    for phase in ("prefill", "decode"):
        lengths = [c["context_tokens"] for c in cells if c["phase"] == phase and c["batch_size"] == 2]
        assert lengths == [8, 16]


def test_the_models_are_sampled_in_turn() -> None:
    diary: list[str] = []
    models = {name: Recorder(name, diary) for name in ("a", "b")}
    results = run(new_task(), models, PREFILL)
    assert diary[-6:] == ["a prefill", "b prefill"] * 3
    for result in results.values():
        assert isinstance(result, Measurement)
        assert len(result.samples["time_ms"]) == 3, "the warm-up is not among the samples"
        assert result.metrics["state_bytes"] == 2 * 8 * 4
        ordered = sorted(result.samples["time_ms"])
        assert result.metrics["median_ms"] == ordered[1]
        assert ordered[0] <= result.metrics["p10_ms"] <= ordered[1] <= result.metrics["p90_ms"] <= ordered[2]
        assert result.metrics["tokens_per_s"] == pytest.approx(1e3 * 2 * 8 / ordered[1])
        assert "dispatch_ms" not in result.metrics


def test_decode_is_the_time_of_one_token() -> None:
    def nap(num_calls: int) -> None:
        time.sleep(0.02)

    model = Recorder("a", [], nap)
    result = run(new_task(), {"a": model}, DECODE)["a"]
    assert all(20 <= sample < 80 for sample in result.samples["time_ms"])
    assert result.metrics["tokens_per_s"] == pytest.approx(1e3 * 2 / result.metrics["median_ms"])
    assert 20 <= result.metrics["first_call_ms"] < 80
    assert model.diary.count("a prefill") == 1


def test_every_decode_sample_starts_from_the_same_state() -> None:
    model = Recorder("a", [])
    result = run(new_task(), {"a": model}, DECODE)["a"]
    one = [(8 + step, 2.0 * step) for step in range(4)]
    assert model.decoded_at == one * (1 + 1 + 3), "first call, warm-up, samples"
    assert max(model.rooms) == 8 + 4, "room for the prompt and the tokens of one sample"
    assert result.metrics["state_bytes"] == 2 * 8 * 4, "the state at context_tokens, without that room"


def test_a_long_prompt_is_fed_in_chunks() -> None:
    model = Recorder("a", [])
    run(new_task(chunk_tokens=3), {"a": model}, PREFILL)
    assert model.chunks[:3] == [3, 3, 2]


@pytest.mark.parametrize("cell", [PREFILL, DECODE], ids=["prefill", "decode"])
def test_a_model_that_reads_whole_prompts_gets_them_whole(cell: dict[str, Any]) -> None:
    model = Recorder("a", [])
    model.reads_whole_prompts = True
    run(new_task(chunk_tokens=3), {"a": model}, cell)
    assert model.chunks and set(model.chunks) == {8}


def test_running_out_of_memory_is_that_models_alone() -> None:
    def fail(num_calls: int) -> None:
        if num_calls == 4:  # in the second sample
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 PiB")

    models = {"a": Recorder("a", [], fail), "b": Recorder("b", [])}
    results = run(new_task(), models, PREFILL)
    assert results["a"].status == "oom" and "can't allocate memory" in results["a"].reason
    assert len(results["b"].samples["time_ms"]) == 3


@pytest.mark.parametrize("when", [1, 10])  # in the prefill, and in a sample
def test_out_of_memory_beside_others_states_is_tried_again_alone(when: int) -> None:
    def fail_once(num_calls: int) -> None:
        if num_calls == when:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 PiB")

    def fail(num_calls: int) -> None:
        if num_calls >= when:
            raise MemoryError("too large")

    diary: list[str] = []
    models = {
        "a": Recorder("a", diary),
        "b": Recorder("b", diary, fail_once),
        "c": Recorder("c", diary, fail),
    }
    outcomes = list(new_task().measure_in_turn(models, DECODE, TimingRun(CPU)))
    assert [name for name, _ in outcomes] == ["a", "b", "c"]
    results = dict(outcomes)
    assert isinstance(results["a"], Measurement)
    assert isinstance(results["b"], Measurement) and len(results["b"].samples["time_ms"]) == 3
    assert results["c"] == ("oom", "MemoryError: too large")
    last_a = len(diary) - diary[::-1].index("a decode")
    assert diary[last_a:].count("b prefill") == 1 and "c prefill" in diary[last_a:]


@pytest.mark.parametrize("when", [1, 4])  # in the first call, and in a sample
@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_any_other_error_is_that_models_alone_too(when: int, error: type[Exception]) -> None:
    def fail(num_calls: int) -> None:
        if num_calls == when:
            raise error("shapes do not match")

    turns: list[str] = []
    models = {"a": Recorder("a", []), "b": Recorder("b", [], fail), "c": Recorder("c", [])}
    outcomes = new_task().measure_in_turn(models, PREFILL, TimingRun(CPU), turns.append)
    name, failure = next(outcomes)
    assert (name, failure) == ("b", ("crashed", f"{error.__name__}: shapes do not match"))
    assert turns[-1] == "b", "whoever writes records knew whose turn it was"
    results = dict(outcomes)
    assert [len(results[name].samples["time_ms"]) for name in ("a", "c")] == [3, 3]


def test_an_error_of_whoever_keeps_the_records_is_nobodys_failure() -> None:
    def fail(name: str) -> None:
        raise OSError("no space left on device")

    models = {"a": Recorder("a", [])}
    with pytest.raises(OSError, match="no space left"):
        list(new_task().measure_in_turn(models, PREFILL, TimingRun(CPU), fail))


def test_a_model_that_is_too_slow_is_a_timeout_there_and_at_longer_contexts() -> None:
    def nap(num_calls: int) -> None:
        time.sleep(0.05)

    task, timing_run = new_task(max_cell_s=0.02), TimingRun(CPU)
    models = {"slow": Recorder("slow", [], nap), "quick": Recorder("quick", [])}
    results = run(task, models, PREFILL, timing_run)
    assert results["slow"][0] == "timeout" and "max_cell_s=0.02" in results["slow"][1]
    assert isinstance(results["quick"], Measurement)
    before = models["slow"].num_calls
    longer = run(task, models, {**PREFILL, "context_tokens": 16}, timing_run)
    assert longer["slow"][0] == "timeout" and "8 tokens" in longer["slow"][1]
    assert models["slow"].num_calls == before, "it is not tried again"
    assert run(task, models, {**PREFILL, "batch_size": 1}, timing_run)["slow"][0] == "timeout"
    assert models["slow"].num_calls > before, "another batch size is tried"
    before = models["slow"].num_calls
    run(task, models, {**PREFILL, "context_tokens": 16}, TimingRun(CPU))
    assert models["slow"].num_calls > before, "the task itself remembers nothing: another run tries"


def test_a_prefill_that_is_too_slow_is_a_timeout_of_decode_too() -> None:
    def nap(num_calls: int) -> None:
        time.sleep(0.05)

    task, timing_run = new_task(max_cell_s=0.02), TimingRun(CPU)
    model = Recorder("slow", [], nap)
    assert run(task, {"slow": model}, {**PREFILL, "context_tokens": 16}, timing_run)["slow"][0] == "timeout"
    before = model.num_calls
    for context in (16, 32):
        status, reason = run(task, {"slow": model}, {**DECODE, "context_tokens": context}, timing_run)["slow"]
        assert status == "timeout" and "prefill of 16 tokens" in reason
    assert model.num_calls == before, "it is not tried"
    run(task, {"slow": model}, DECODE, timing_run)
    assert model.num_calls > before, "a shorter context is"


def test_dispatch_is_part_of_prefill_and_shown_apart() -> None:
    def nap(num_calls: int) -> None:
        time.sleep(0.004)

    model = Recorder("a", [], nap)
    model.is_adaptive = True
    result = run(new_task(), {"a": model}, PREFILL)["a"]
    assert result.metrics["dispatch_ms"] >= 4
    assert result.metrics["median_ms"] >= 8
    assert model.diary[:2] == ["a dispatch", "a prefill"]


def test_a_real_model_of_several_passes_has_all_its_numbers(new_model: Callable[..., SequenceModel]) -> None:
    models = {name: new_model(name, dtype=torch.float32) for name in ("transformer", "transformer_squared")}
    for cell in (PREFILL, DECODE):
        results = run(new_task(), models, cell)
        assert results["transformer_squared"].metrics["state_bytes"] > 0
        if cell is PREFILL:
            assert results["transformer_squared"].metrics["dispatch_ms"] > 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("context_lengths_tokens", []),
        ("context_lengths_tokens", [0]),
        ("batch_sizes", [-1]),
        ("num_samples", 0),
        ("num_decode_steps", 0),
        ("max_cell_s", 0),
        ("chunk_tokens", -2),
    ],
)
def test_settings_that_make_no_sense(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"tasks.latency.{name}=.* must be positive"):
        new_task(**{name: value})


@pytest.fixture
def graphs_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A CPU that has graphs: a captured call is run again. The list grows with every replay."""
    replays: list[str] = []

    def capture(call: Callable[[], None]) -> Callable[[], None]:
        call()

        def replay() -> None:
            replays.append("replay")
            call()

        return replay

    monkeypatch.setattr("tasks.latency.can_capture", lambda device: True)
    monkeypatch.setattr("tasks.latency.copy_bytes_per_s", lambda device: 1e9)
    monkeypatch.setattr("tasks.latency.CudaCapture", lambda device: capture)
    return replays


@pytest.mark.parametrize("decode_graph", ["auto", True])
def test_decode_is_replayed_where_there_are_graphs(
    new_model: Callable[..., SequenceModel], graphs_here: list[str], decode_graph: Any
) -> None:
    models = {name: new_model(name, dtype=torch.float32) for name in ("transformer", "ttt_linear")}
    task = new_task(decode_graph=decode_graph)
    results = run(task, models, DECODE)
    assert len(graphs_here) == 2 * 4 * (1 + 3), "two models, four steps: first call and samples"
    for name, num_graphs in (("transformer", 1), ("ttt_linear", 4)):
        assert results[name].details == {
            "is_prefilled": True,
            "uses_decode_graph": True,
            "num_decode_graphs": num_graphs,
        }
        assert len(results[name].samples["time_ms"]) == 3
        assert results[name].metrics["peak_memory_bytes"] > 0
    assert run(task, models, PREFILL)["transformer"].details == {}
    details = run(new_task(decode_graph=False), models, DECODE)["transformer"].details
    assert details == {"is_prefilled": True, "uses_decode_graph": False}


def test_a_model_without_graphs_says_so_and_is_called(graphs_here: list[str]) -> None:
    result = run(new_task(), {"a": Recorder("a", [])}, DECODE)["a"]
    assert len(result.samples["time_ms"]) == 3 and not graphs_here
    assert result.details["uses_decode_graph"] is False
    assert "Recorder does not say which of its decode steps" in result.details["why_no_decode_graph"]
    failure = run(new_task(decode_graph=True), {"a": Recorder("a", [])}, DECODE)["a"]
    assert failure.status == "unsupported" and "no CUDA graph can hold them" in failure.reason


def test_out_of_memory_in_a_capture_is_no_reason_to_do_without(
    new_model: Callable[..., SequenceModel], graphs_here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(call: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr("tasks.latency.CudaCapture", lambda device: capture)
    result = run(new_task(), {"a": new_model("mamba", dtype=torch.float32)}, DECODE)["a"]
    assert result == ("oom", "RuntimeError: CUDA error: out of memory")


def test_graphs_that_are_asked_for_need_a_gpu() -> None:
    details = run(new_task(), {"a": Recorder("a", [])}, DECODE)["a"].details
    assert details == {"is_prefilled": True, "uses_decode_graph": False}
    with pytest.raises(
        ValueError, match=r"decode_graph=true needs device=cuda, not cpu; choose auto or false"
    ):
        run(new_task(decode_graph=True), {"a": Recorder("a", [])}, DECODE)


def test_decode_needs_no_prefill_where_none_is_asked_for(
    new_model: Callable[..., SequenceModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state is said to hold the context: attention reads that many keys, and there is room for more."""
    models = {name: new_model(name, dtype=torch.float32) for name in ("transformer", "titans_mal")}
    positions = []
    for model in models.values():
        monkeypatch.setattr(model, "prefill", None)
        decode = model.decode

        def watched(token: Tensor, state: Any, decode: Any = decode) -> Any:
            positions.append((state.num_tokens, state.mixers[0][0].num_tokens))
            return decode(token, state)

        monkeypatch.setattr(model, "decode", watched)
    for result in run(new_task(prefills_for_decode=False), models, DECODE).values():
        assert len(result.samples["time_ms"]) == 3 and result.details["is_prefilled"] is False
    assert set(positions) == {(8 + step, 8 + step) for step in range(4)}


@pytest.mark.parametrize(("prefills_for_decode", "is_tried"), [(True, False), (False, True)])
def test_a_prefill_that_was_too_slow_keeps_no_decode_from_being_measured_that_needs_none(
    new_model: Callable[..., SequenceModel], prefills_for_decode: bool, is_tried: bool
) -> None:
    models = {"transformer": new_model("transformer", dtype=torch.float32)}
    timing_run = TimingRun(CPU)
    settings = {"prefills_for_decode": prefills_for_decode}
    slow = run(new_task(max_cell_s=1e-9, **settings), models, PREFILL, timing_run)["transformer"]
    assert slow.status == "timeout"
    result = run(new_task(**settings), models, DECODE, timing_run)["transformer"]
    assert isinstance(result, Measurement) == is_tried


def test_a_phase_can_be_measured_alone() -> None:
    assert {cell["phase"] for cell in new_task(phases=["decode"]).cells()} == {"decode"}
    with pytest.raises(ValueError, match=r"phases=.* must name prefill, decode or both"):
        new_task(phases=[])


def test_a_decode_step_is_held_against_what_it_must_move(
    new_model: Callable[..., SequenceModel], graphs_here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.latency.copy_bytes_per_s", lambda device: 1e6)
    models = {name: new_model(name, dtype=torch.float32) for name in ("transformer", "mamba")}
    results = run(new_task(), models, DECODE)
    for name, model in models.items():
        state = model.state_bytes_at(2, 8)
        written = state if name == "mamba" else model.state_bytes_at(2, 9) - state
        traffic = 4 * model.num_parameters + state + written
        assert results[name].metrics["traffic_bytes"] == traffic
        assert results[name].metrics["floor_ms"] == pytest.approx(traffic / 1e3)
    assert "floor_ms" not in run(new_task(), models, PREFILL)["mamba"].metrics


def test_all_that_is_declared_is_measured_and_nothing_else(
    new_model: Callable[..., SequenceModel], graphs_here: list[str]
) -> None:
    models = {"a": new_model("transformer_squared", dtype=torch.float32)}
    results = [run(new_task(), models, cell)["a"] for cell in (PREFILL, DECODE)]
    assert {name for result in results for name in result.metrics} == {m.name for m in Latency.METRICS}
