"""Our plain PyTorch against public implementations: `python -m harness.peers`, on a CPU, prefill at batch 1.

Where a peer computes the same function, it is given the same weights, and both must answer alike before
anything is timed; where it does not, the line says what is alike and what is not. Where the peer has no fast
form on a CPU, the line says so. Then both run in turn, round by round, and a line's speed is the peer's time
over ours in the same round: the median, and the quartiles beside it. Needs the extra `peers`. Pin it to the
cores that it shall have, as with taskset -c 2,3.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from torch import Tensor

from archs.base import SequenceModel
from harness.config.build import build_model, instantiate, resolve
from harness.config.compose import compose_config
from harness.measure.statistics import percentile
from harness.measure.turns import in_turn
from harness.peers.titans import titans_layers
from harness.record.command import CommandRecords
from harness.record.environment import describe
from harness.record.identity import machine_identity
from harness.record.metrics import Metric

WIDTH, NUM_HEADS, D_FF, VOCAB = 256, 4, 688, 256
CPU = torch.device("cpu")

#: Largest difference of two float32 logits that may be called rounding, as for published checkpoints.
PARITY_TOLERANCE = 2e-4

#: The numbers of a "peer" point; its cell is the comparison and the length of the prompt.
METRICS = (
    Metric(
        name="speed",
        label="times as fast as the peer",
        unit="",
        direction="higher",
        kind="cost",
        low="speed_low",
        high="speed_high",
        is_headline=True,
    ),
    Metric(name="speed_low", label="first quartile", unit="", direction="neither", kind="cost"),
    Metric(name="speed_high", label="third quartile", unit="", direction="neither", kind="cost"),
    Metric(name="minimum_speed", label="required speed", unit="", direction="neither", kind="cost"),
    Metric(name="median_ms", label="ours", unit="ms", direction="lower", kind="cost"),
    Metric(name="peer_median_ms", label="peer", unit="ms", direction="neither", kind="cost"),
    Metric(name="largest_difference", label="difference of logits", unit="", direction="lower", kind="cost"),
)

Call = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One comparison.

    make:          tokens -> our call and the peer's, each a prefill from an empty state.
    package:       what the peer is in. peer: its name.
    minimum_speed: what we hold ourselves to, the peer's time over ours.
    difference:    what is not alike, or None where the outputs must agree.
    note:          what a reader of the speed must know of the peer, beside.
    """

    make: Callable[[int], tuple[Call, Call]]
    package: str
    peer: str
    minimum_speed: float
    difference: str | None = None
    note: str | None = None


def _prefill(model: SequenceModel, tokens: Tensor) -> Call:
    def call() -> Tensor:
        return model.prefill(tokens, model.init_state(*tokens.shape))[0][:, 0]

    return call


def _published_prefill(model: Callable[..., Any], tokens: Tensor) -> Call:
    def call() -> Tensor:
        return model(input_ids=tokens, use_cache=True, logits_to_keep=1).logits[:, 0]

    return call


def _tokens(num_tokens: int) -> Tensor:
    return torch.randint(VOCAB, (1, num_tokens), generator=torch.Generator().manual_seed(0))


def _published(name: str, **settings: Any) -> Any:
    """Return a random model of transformers; `name` is its class without Config and ForCausalLM."""
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = getattr(transformers, f"{name}Config")(vocab_size=VOCAB, hidden_size=WIDTH, **ids, **settings)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def _llama() -> Any:
    return _published("Llama", num_hidden_layers=2, num_attention_heads=NUM_HEADS, intermediate_size=D_FF)


def _same_weights(peer: Any, num_tokens: int) -> tuple[Call, Call]:
    """Return ours with the peer's weights, through a checkpoint on disk, and the peer."""
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(StringIO()):  # a bar for the writing
        peer.save_pretrained(folder)
        ours = instantiate({"_target_": "archs.pretrained.load.load_pretrained", "folder": folder})
    tokens = _tokens(num_tokens)
    return _prefill(ours, tokens), _published_prefill(peer, tokens)


def _mamba(num_tokens: int) -> tuple[Call, Call]:
    return _same_weights(_published("Mamba", num_hidden_layers=4, state_size=16), num_tokens)


def _mamba2(num_tokens: int) -> tuple[Call, Call]:
    settings = {"state_size": 128, "head_dim": 64, "num_heads": 8, "n_groups": 1}
    return _same_weights(_published("Mamba2", num_hidden_layers=4, **settings), num_tokens)


def _transformer(num_tokens: int) -> tuple[Call, Call]:
    return _same_weights(_llama(), num_tokens)


def _ttt(arch: str) -> Callable[[int], tuple[Call, Call]]:
    def make(num_tokens: int) -> tuple[Call, Call]:
        sizes = {"d_model": WIDTH, "num_layers": 2, "num_heads": NUM_HEADS, "d_ff": D_FF}
        overrides = [f"size.{key}={value}" for key, value in sizes.items()]
        config = compose_config([f"arch={arch}", "match=none", f"data.vocab_size={VOCAB}", *overrides])
        torch.manual_seed(0)
        model = build_model(resolve(config)["arch"]["model"]).eval()
        tokens = _tokens(num_tokens)
        return _prefill(model, tokens), _published_prefill(_llama(), tokens)

    return make


def _titans(num_tokens: int) -> tuple[Call, Call]:
    torch.manual_seed(0)
    make_ours, make_peer = titans_layers(WIDTH, NUM_HEADS, chunk_tokens=16)
    peer, ours = make_peer(), make_ours()
    x = torch.randn(1, num_tokens, WIDTH)
    return lambda: ours.step(x, ours.init_memory(1), 0, None)[0], lambda: peer(x)[0]


TTT_DIFFERENCE = "another layer: alike are the width, 2 layers, 4 heads and the feed-forward"
TITANS_DIFFERENCE = (
    "another update: alike are the width, heads, the network's matrices, the chunk's tokens, and that there "
    "are momentum and decay; the peer takes the gradients of all chunks at once, at the starting weights, "
    "where ours takes a chunk's at the weights that the chunk before left; it has one decay and one momentum "
    "a chunk, where ours has one a token; its loss is the mean over a value's entries, ours the sum; it "
    "holds the weights after every chunk at once; its network has a norm and a residual, and its output is "
    "projected"
)
MAMBA_NOTE = (
    "on a CPU the peer's scan is transformers' loop in Python over the tokens, what it falls back to without "
    "mamba-ssm's GPU kernels, so this is no comparison with those"
)

LINES = {
    "mamba": Line(
        make=_mamba,
        package="transformers",
        peer="MambaForCausalLM",
        minimum_speed=4.0,
        note=MAMBA_NOTE,
    ),
    "mamba2": Line(make=_mamba2, package="transformers", peer="Mamba2ForCausalLM", minimum_speed=1.3),
    "transformer": Line(
        make=_transformer, package="transformers", peer="LlamaForCausalLM", minimum_speed=1.0
    ),
    "ttt_linear": Line(
        make=_ttt("ttt_linear"),
        package="transformers",
        peer="LlamaForCausalLM",
        minimum_speed=1 / 0.5,
        difference=TTT_DIFFERENCE,
    ),
    "ttt_mlp": Line(
        make=_ttt("ttt_mlp"),
        package="transformers",
        peer="LlamaForCausalLM",
        minimum_speed=1 / 0.9,
        difference=TTT_DIFFERENCE,
    ),
    "titans_memory": Line(
        make=_titans,
        package="titans_pytorch",
        peer="NeuralMemory",
        minimum_speed=8.0,
        difference=TITANS_DIFFERENCE,
    ),
}


@torch.no_grad()
def compare(name: str, num_tokens: int, num_rounds: int) -> dict[str, Any]:
    """Run one comparison. Return speed with its quartiles, times_ms of both, largest_difference, null where
    the outputs are not comparable, and the line's difference and note. Raises ValueError where the outputs
    are comparable and differ by more than rounding."""
    line = LINES[name]
    ours, peer = line.make(num_tokens)
    difference = (ours() - peer()).abs().max().item()  # warms both up, too
    if line.difference is None and not difference <= PARITY_TOLERANCE:
        raise ValueError(
            f"{name} and {line.peer} differ by {difference:.2g} on the same weights, more than "
            f"{PARITY_TOLERANCE}; nothing was timed."
        )
    return {
        "line": name,
        "peer": f"{line.package}.{line.peer}",
        "minimum_speed": line.minimum_speed,
        **in_turn(ours, peer, num_rounds, CPU),
        "largest_difference": difference if line.difference is None else None,
        "difference": line.difference,
        "note": line.note,
    }


def _text(result: dict[str, Any]) -> str:
    low, high = result["speed_quartiles"]
    line = LINES[result["line"]]
    parity = line.difference or f"same weights, logits agree to {result['largest_difference']:.1g}"
    holds = "" if result["speed"] >= result["minimum_speed"] else ", MISSED"
    our_ms, peer_ms = (percentile(result[key], 0.5) for key in ("our_ms", "peer_ms"))
    return (
        f"{result['line']}: {result['speed']:.2f} times as fast as {result['peer']} "
        f"(quartiles {low:.2f} to {high:.2f}; asked {result['minimum_speed']:.2f}{holds}), "
        f"{our_ms:.0f} ms against {peer_ms:.0f} ms; {parity}"
        f"{'' if line.note is None else f'; {line.note}'}"
    )


def write_point(
    records: CommandRecords, result: Mapping[str, Any], num_tokens: int, environment: Mapping[str, Any]
) -> None:
    """Write a comparison, as `compare` returns it, as a point."""
    low, high = result["speed_quartiles"]
    records.write(
        "peer",
        {"case": result["line"], "context_tokens": num_tokens},
        machine_identity("peer", environment, {"peer": result["peer"], "width": WIDTH}),
        metrics={
            "speed": result["speed"],
            "speed_low": low,
            "speed_high": high,
            "minimum_speed": result["minimum_speed"],
            "median_ms": percentile(result["our_ms"], 0.5),
            "peer_median_ms": percentile(result["peer_ms"], 0.5),
            "largest_difference": result["largest_difference"],
        },
        samples={"our_ms": result["our_ms"], "peer_ms": result["peer_ms"]},
        details={key: result[key] for key in ("peer", "difference", "note")},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line per comparison, and one JSON object with every time as the last line. 0 where all speeds
    hold, 1 where one does not, 2 on a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.peers", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("lines", nargs="*", help=f"which of {', '.join(LINES)}; default all")
    parser.add_argument("--tokens", type=int, default=8192, help="length of the prompt, default 8192")
    parser.add_argument("--rounds", type=int, default=7, help="how often both are timed, default 7")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch, default 2")
    parser.add_argument("--output", help="folder whose records/ the comparisons are written to")
    given = parser.parse_args(arguments)
    names = given.lines or list(LINES)
    try:
        for key in ("tokens", "rounds", "threads"):
            if getattr(given, key) < 1:
                raise ValueError(f"--{key} {getattr(given, key)} must be positive.")
        for name in names:
            if name not in LINES:
                raise ValueError(f"there is no line {name!r}; choose of {', '.join(LINES)}.")
            if importlib.util.find_spec(LINES[name].package) is None:
                raise ValueError(
                    f"{name} is compared with the package {LINES[name].package}, which is not installed; "
                    "run pip install 'longarch[peers]', or name other lines."
                )
        torch.set_num_threads(given.threads)
        setting = {"num_tokens": given.tokens, "batch_size": 1, "num_threads": given.threads, "width": WIDTH}
        environment = describe(CPU)
        records = CommandRecords(
            given.output, "harness.peers", metrics={"peer": METRICS}, environment=environment, config=setting
        )
        results = []
        for name in names:
            results.append(compare(name, given.tokens, given.rounds))
            write_point(records, results[-1], given.tokens, environment)
            print(_text(results[-1]), flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({**setting, "torch": torch.__version__, "results": results}))
    return 0 if all(r["speed"] >= r["minimum_speed"] for r in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
