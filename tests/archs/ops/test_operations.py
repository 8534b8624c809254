"""Every implementation of every operation against its definition: values, states, gradients and refusals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from archs.ops import OPERATIONS
from archs.ops.operation import ImplementationUnavailable, Operation
from tests.archs.ops.subjects import SUBJECTS
from tests.archs.ops.subjects.base import Case, Inputs, Subject, parameters

Check = Callable[..., None]
BY_NAME = {operation.name: operation for operation in OPERATIONS}
DIFFERENTIABLE = [name for name, subject in SUBJECTS.items() if subject.is_differentiable]
WITH_STATE = [name for name, subject in SUBJECTS.items() if subject.state]
WITH_KERNEL = [name for name, operation in BY_NAME.items() if "triton" in operation.implementations]


def in_pytorch(operation: Operation) -> list[str]:
    """The implementations that any machine can run."""
    return [name for name, one in operation.implementations.items() if one.requires is None]


def every(
    field: str, names: Sequence[str] = tuple(SUBJECTS), *, implementations: bool = False, **more: Any
) -> pytest.MarkDecorator:
    """Parametrise by operation and case, and by the implementations in PyTorch but the definition."""
    found = []
    for name in names:
        for parameter in parameters(getattr(SUBJECTS[name], field)):
            for implementation in in_pytorch(BY_NAME[name]) if implementations else ("triton",):
                if implementation != "reference":
                    values = (name, *parameter.values, *([implementation] if implementations else []))
                    ids = [name, *([implementation] if implementations else []), str(parameter.id)]
                    found.append(pytest.param(*values, id=" ".join(ids), marks=parameter.marks))
    columns = ("name", "case", "implementation") if implementations else ("name", "case")
    return pytest.mark.parametrize(columns, found)


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, Any]], None]:
    """Replace constants of the code, by their dotted names."""

    def replace(values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            monkeypatch.setattr(name, value)

    return replace


def inputs_of(subject: Subject, case: Case) -> Inputs:
    inputs = subject.make(**case.sizes)
    return inputs if case.with_state else {n: t for n, t in inputs.items() if n not in subject.state}


def as_leaves(inputs: Inputs, *, with_zeros: bool = True) -> Inputs:
    """Inputs that need gradients. Without `with_zeros` those of zeros need none, such as the open gradient of
    a mini-batch that has no tokens yet, which an implementation need not read."""
    return {
        name: tensor.detach().requires_grad_(with_zeros or bool(tensor.any()))
        for name, tensor in inputs.items()
    }


def gradients(leaves: Inputs, outputs: list[Tensor]) -> Inputs:
    """The gradients of a random sum of all outputs, zeros where an input is not read."""
    wanted = {name: tensor for name, tensor in leaves.items() if tensor.requires_grad}
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(output.shape, generator=generator).bfloat16() for output in outputs]
    # The open gradient at the end of a mini-batch is 0, which may be a constant.
    pairs = [(o, w.to(o)) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
    found = torch.autograd.grad(
        [output for output, _ in pairs],
        list(wanted.values()),
        [weight for _, weight in pairs],
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(wanted, found, strict=True))


def in_pieces(
    subject: Subject, inputs: Inputs, sizes: Mapping[str, Any], cuts: Sequence[int], implementation: str
) -> list[Tensor]:
    """The call cut into several before the tokens `cuts`, each with the state that the last one left."""
    num_tokens, period = sizes["tokens"], sizes.get("mini_batch", 16)
    names = subject.state_of(inputs)
    state = [inputs[name] for name in names]
    outputs = []
    for start, stop in pairwise((0, *cuts, num_tokens)):
        piece = {n: t[:, start:stop] if n in subject.tokens else t for n, t in inputs.items()}
        position = (sizes.get("position", 0) + start) % period
        y, *state = subject.call(
            piece | dict(zip(names, state, strict=True)), implementation, {**sizes, "position": position}
        )
        outputs.append(y)
    return [torch.cat(outputs, dim=1), *state]


def by_steps(subject: Subject, inputs: Inputs, sizes: Mapping[str, Any], implementation: str) -> list[Tensor]:
    """Single tokens, in place where the operation has a step."""
    if subject.step is None:
        cuts = sizes.get("cuts", range(1, sizes["tokens"]))
        return in_pieces(subject, inputs, sizes, cuts, implementation)
    (name,) = subject.state
    state = inputs[name].clone()
    outputs = []
    for t in range(sizes["tokens"]):
        token = {n: x[:, t] if n in subject.tokens else x for n, x in inputs.items()}
        outputs.append(subject.step(token | {name: state}, implementation))
    return [torch.stack(outputs, dim=1), state]


def test_every_operation_is_a_subject() -> None:
    assert set(SUBJECTS) == set(BY_NAME)
    assert all(SUBJECTS[name].kernel and SUBJECTS[name].kernel_patches is not None for name in WITH_KERNEL)


@every("plain", implementations=True)
def test_values_and_gradients_in_float64_are_those_of_the_definition(
    name: str, case: Case, implementation: str, patch: Callable[..., None]
) -> None:
    """With gradients, and without, where an implementation may work in place."""
    patch(case.patches)
    subject = SUBJECTS[name]
    rtol, atol = subject.tolerance
    inputs = inputs_of(subject, case)
    before = {key: tensor.clone() for key, tensor in inputs.items()}
    expected_leaves, leaves = (as_leaves(inputs, with_zeros=False) for _ in range(2))
    expected = subject.call(expected_leaves, "reference", case.sizes)
    actual = subject.call(leaves, implementation, case.sizes)
    with torch.no_grad():
        unrecorded = subject.call(inputs, implementation, case.sizes)
    for one, other, wanted in zip(actual, unrecorded, expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=0 if atol < 1e-10 else rtol, atol=atol)
        torch.testing.assert_close(other, wanted, rtol=0 if atol < 1e-10 else rtol, atol=atol)
    torch.testing.assert_close(inputs, before, rtol=0, atol=0)
    if subject.is_differentiable:
        found = gradients(leaves, actual)
        for key, wanted in gradients(expected_leaves, expected).items():
            torch.testing.assert_close(
                found[key],
                wanted,
                rtol=max(rtol, 1e-10),
                atol=case.gradient_atol,
                msg=lambda text, key=key: f"gradient of {key}: {text}",
            )


@pytest.mark.usefixtures("nan_filled_buffers")
@every("kernel", WITH_KERNEL)
def test_a_kernels_values_and_gradients_are_those_of_the_definition(
    name: str,
    case: Case,
    patch: Callable[..., None],
    kernel_device: torch.device,
    kernel_dtype: torch.dtype,
    assert_kernel_close: Check,
) -> None:
    """On buffers filled with NaN."""
    subject = SUBJECTS[name]
    patch({} if case.is_published_width else {**subject.kernel_patches, **case.patches})
    inputs = subject.cast(inputs_of(subject, case), kernel_device, kernel_dtype)
    leaves, exact = (
        as_leaves(tensors, with_zeros=case.against == "reference")
        for tensors in (inputs, subject.exact(inputs))
    )
    if not subject.is_differentiable:
        leaves, exact = inputs, subject.exact(inputs)
    actual, expected = (
        subject.call(leaves, "triton", case.sizes),
        subject.call(exact, case.against, case.sizes),
    )
    assert actual[0].dtype == kernel_dtype
    assert all(part.dtype == torch.float32 for part in actual[1:])
    for index, (one, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert_kernel_close(one.detach(), wanted.detach(), kernel_dtype, f"output {index}")
    if subject.is_differentiable:
        found = gradients(leaves, actual)
        for key, wanted in gradients(exact, expected).items():
            assert_kernel_close(found[key], wanted, kernel_dtype, f"gradient of {key}")
    if subject.same_without_gradients:
        with torch.no_grad():
            unrecorded = subject.call(inputs, "triton", case.sizes)
        torch.testing.assert_close(unrecorded, [one.detach() for one in actual], rtol=0, atol=0)


@pytest.mark.parametrize("name", WITH_KERNEL)
def test_two_runs_of_a_kernel_agree_bit_for_bit(
    name: str, patch: Callable[..., None], kernel_device: torch.device, kernel_dtype: torch.dtype
) -> None:
    """And what it is given stays as it was."""
    subject = SUBJECTS[name]
    case = [case for case in subject.kernel if not case.is_published_width][2]
    patch({**subject.kernel_patches, **case.patches})
    inputs = subject.cast(inputs_of(subject, case), kernel_device, kernel_dtype)
    before = {key: tensor.clone() for key, tensor in inputs.items()}
    results = []
    for _ in range(2):
        leaves = as_leaves(inputs) if subject.is_differentiable else inputs
        outputs = subject.call(leaves, "triton", case.sizes)
        found = gradients(leaves, outputs) if subject.is_differentiable else {}
        results.append([*outputs, *found.values()])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    torch.testing.assert_close(inputs, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "sizes", "cuts"),
    [(name, *values) for name, subject in SUBJECTS.items() for values in subject.cuts],
)
def test_a_state_carries_a_call_that_is_cut_anywhere(
    name: str, sizes: Mapping[str, Any], cuts: Sequence[int]
) -> None:
    subject = SUBJECTS[name]
    inputs = subject.make(**sizes)
    for implementation in in_pytorch(BY_NAME[name]):
        whole = subject.call(inputs, implementation, sizes)
        torch.testing.assert_close(
            in_pieces(subject, inputs, sizes, cuts, implementation), whole, rtol=0, atol=1e-11
        )


@pytest.mark.parametrize(
    ("name", "sizes", "cuts"),
    [(name, *values) for name in WITH_KERNEL for values in SUBJECTS[name].kernel_cuts],
)
def test_a_state_carries_a_kernels_call_that_is_cut_anywhere(
    name: str,
    sizes: Mapping[str, Any],
    cuts: Sequence[int],
    patch: Callable[..., None],
    kernel_device: torch.device,
    kernel_dtype: torch.dtype,
    assert_kernel_close: Check,
) -> None:
    """Values and gradients, against the definition in one call."""
    subject = SUBJECTS[name]
    patch(subject.kernel_patches)
    inputs = subject.cast(subject.make(**sizes), kernel_device, kernel_dtype)
    leaves, exact = as_leaves(inputs), as_leaves(subject.exact(inputs))
    actual = in_pieces(subject, leaves, sizes, cuts, "triton")
    expected = subject.call(exact, "reference", sizes)
    for index, (one, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert_kernel_close(one.detach(), wanted.detach(), kernel_dtype, f"output {index}")
    found = gradients(leaves, actual)
    for key, wanted in gradients(exact, expected).items():
        assert_kernel_close(found[key], wanted, kernel_dtype, f"gradient of {key}")


@pytest.mark.parametrize("name", [name for name, subject in SUBJECTS.items() if subject.step])
def test_steps_are_the_whole(name: str) -> None:
    subject = SUBJECTS[name]
    assert subject.steps is not None
    inputs = subject.make(**subject.steps)
    whole = subject.call(inputs, "reference", subject.steps)
    for implementation in in_pytorch(BY_NAME[name]):
        steps = by_steps(subject, inputs, subject.steps, implementation)
        torch.testing.assert_close(steps, whole, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("nan_filled_buffers")
@torch.no_grad()
@every("kernel_steps", WITH_KERNEL)
def test_a_kernels_single_tokens_are_the_whole(
    name: str,
    case: Case,
    patch: Callable[..., None],
    kernel_device: torch.device,
    kernel_dtype: torch.dtype,
    assert_kernel_close: Check,
) -> None:
    subject = SUBJECTS[name]
    inputs = subject.cast(subject.make(**case.sizes), kernel_device, kernel_dtype)
    before = {key: tensor.clone() for key, tensor in inputs.items()}
    expected = subject.call(subject.exact(inputs), "reference", case.sizes)
    actual = by_steps(subject, inputs, case.sizes, "triton")
    assert actual[0].dtype == kernel_dtype
    for index, (one, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert_kernel_close(one, wanted, kernel_dtype, f"output {index}")
    torch.testing.assert_close(inputs, before, rtol=0, atol=0)
    if case.sizes["tokens"] == 1:
        torch.testing.assert_close(by_steps(subject, inputs, case.sizes, "triton"), actual, rtol=0, atol=0)


@pytest.mark.parametrize("name", WITH_STATE)
def test_half_precision_keeps_its_state_in_float32(name: str) -> None:
    subject = SUBJECTS[name]
    case = subject.plain[0]
    inputs = subject.cast(subject.make(**case.sizes), torch.device("cpu"), torch.bfloat16)
    y, *state = subject.call(inputs, "auto", case.sizes)
    assert y.dtype == torch.bfloat16 and {part.dtype for part in state} == {torch.float32}


@pytest.mark.parametrize("name", [name for name, subject in SUBJECTS.items() if subject.keeps_precision])
def test_autocast_lowers_neither_values_nor_gradients(name: str) -> None:
    subject = SUBJECTS[name]
    case = max(subject.plain, key=lambda case: case.sizes["tokens"])
    leaves = as_leaves({key: tensor.float() for key, tensor in subject.make(**case.sizes).items()})
    expected = subject.call(leaves, "auto", case.sizes)
    with torch.autocast("cpu", torch.bfloat16):
        actual = subject.call(leaves, "auto", case.sizes)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradients(leaves, actual), gradients(leaves, expected), rtol=0, atol=0)


@pytest.mark.parametrize("name", BY_NAME)
def test_an_unknown_implementation_is_named_with_the_valid_ones(name: str) -> None:
    subject, valid = SUBJECTS[name], ", ".join(["auto", *BY_NAME[name].implementations])
    case = subject.plain[0]
    with pytest.raises(ImplementationUnavailable, match=f"^{name} has .* 'fast'; choose one of {valid}.$"):
        subject.call(subject.make(**case.sizes), "fast", case.sizes)


@pytest.mark.parametrize("name", WITH_KERNEL)
def test_a_kernel_refuses_float64(name: str, kernel_device: torch.device) -> None:
    subject = SUBJECTS[name]
    case = subject.kernel[0]
    inputs = {key: tensor.to(kernel_device) for key, tensor in subject.make(**case.sizes).items()}
    with pytest.raises(ImplementationUnavailable, match=r"not (in )?torch\.float64"):
        subject.call(inputs, "triton", case.sizes)


@pytest.mark.parametrize("name", WITH_KERNEL)
def test_a_kernel_refuses_a_cpu_unless_interpreted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    subject = SUBJECTS[name]
    case = subject.kernel[0]
    inputs = subject.cast(subject.make(**case.sizes), torch.device("cpu"), torch.float32)
    with pytest.raises(ImplementationUnavailable, match=f"'triton' of {name} runs on cuda only, not on cpu"):
        subject.call(inputs, "triton", case.sizes)
