"""The strategies of Transformer²'s first pass."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from archs.attention import Attention
from archs.decoder import Decoder
from archs.transformer_squared.model import TransformerSquared

DOMAINS = ("code", "needle", "prose")
QUESTION, LABELS = [3, 1, 4, 1, 5], [7, 2, 9]
STRATEGIES = ("classifier", "prompt", "classification_expert", "few_shot")


def new_model(**settings: object) -> TransformerSquared:
    """With everything that is learned moved off its start."""
    torch.manual_seed(0)
    mixers = [partial(Attention, num_heads=2, implementation="plain")]
    base = Decoder(vocab_size=13, d_model=8, num_layers=2, d_ff=20, mixers=mixers)
    settings = {
        "classification_prompt": (QUESTION, LABELS),
        "few_shot_target": "prose",
        "dispatch_rule": "mix",
        **settings,
    }
    model = TransformerSquared(base=base, domains=DOMAINS, **settings).double()
    with torch.no_grad():
        dispatcher = model.dispatcher
        for values in (model.experts, *dispatcher.parameters(), dispatcher.mixtures):
            values.add_(torch.randn_like(values))
    return model


def random_prompt(batch: int = 3, length: int = 17) -> Tensor:
    return torch.randint(0, 13, (batch, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_the_prompt_strategy_weighs_the_letters_against_their_own_frequency() -> None:
    model, prompt = new_model(), random_prompt()
    question = torch.tensor(QUESTION)
    asked = model(torch.cat((prompt, question.expand(3, -1)), dim=1))[:, -1].log_softmax(-1)[:, LABELS]
    unasked = model(question[None])[:, -1].log_softmax(-1)[:, LABELS]
    mixture = model.dispatch(prompt, model.init_state(3, 20), strategy="prompt").mixture
    torch.testing.assert_close(mixture, (asked - unasked).softmax(-1), rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_classification_expert_answers_under_its_own_vector() -> None:
    """As if it were the one expert in use; the other experts have no say."""
    model, prompt = new_model(), random_prompt()
    mixture = model.dispatch(prompt, model.init_state(3, 20), strategy="classification_expert").mixture
    model.experts[1] = model.dispatcher.expert
    tokens = torch.cat((prompt, torch.tensor(QUESTION).expand(3, -1)), dim=1)
    logits = model(tokens, model.domain_mixture("needle", 3))[:, -1].log_softmax(-1)
    torch.testing.assert_close(mixture, logits[:, LABELS].softmax(-1), rtol=0, atol=1e-6)


@torch.no_grad()
def test_few_shot_is_its_targets_mixture_and_reads_nothing() -> None:
    model, prompt = new_model(dispatch_strategy="few_shot"), random_prompt()
    for target, index in ((None, 2), ("code", 0)):
        mixture = model.dispatch(prompt, model.init_state(3, 20), target=target).mixture
        torch.testing.assert_close(mixture, model.dispatcher.mixtures[index].expand(3, -1))
    mixture.add_(1.0)
    assert not torch.equal(mixture[0], model.dispatcher.mixtures[0]), "a state owns its mixture"


@torch.no_grad()
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_are_dispatched_apart_and_picking_takes_the_first_choice(strategy: str) -> None:
    mixing, picking = new_model(dispatch_strategy=strategy), new_model(dispatch_rule="pick")
    prompt = random_prompt()
    together = mixing.dispatch(prompt, mixing.init_state(3, 20)).mixture
    alone = mixing.dispatch(prompt[1:2], mixing.init_state(1, 20)).mixture
    torch.testing.assert_close(together[1:2], alone)
    picked = picking.dispatch(prompt, picking.init_state(3, 20), strategy=strategy).mixture
    if strategy == "few_shot":
        torch.testing.assert_close(picked, together)
    else:
        assert picked.tolist() == torch.eye(3)[together.argmax(dim=1)].tolist()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_first_pass_costs_what_a_counter_sees(strategy: str) -> None:
    model = new_model(dispatch_strategy=strategy)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.dispatch(random_prompt(1), model.init_state(1, 20))
    flops = model.dispatch_flops(17)
    assert counter.get_total_flops() == flops.matmul + flops.attention_square


def test_parameters_are_those_that_the_strategy_uses() -> None:
    counts = [new_model(dispatch_strategy=strategy).num_parameters for strategy in STRATEGIES]
    extra = [count - counts[1] for count in counts]
    assert extra == [3 * 16 + 3, 0, 2 * 3 * 8, 3]


def test_what_is_learned_is_saved_and_the_question_is_not() -> None:
    model = new_model()
    names = {name for name in model.state_dict() if name.startswith("dispatcher")}
    assert names == {
        f"dispatcher.{n}" for n in ("classifier.weight", "classifier.bias", "expert", "mixtures")
    }
    model.reset_experts()
    assert torch.equal(model.dispatcher.mixtures, torch.eye(3).double())
    assert torch.equal(model.dispatcher.expert, torch.ones(48).double())


@pytest.mark.parametrize("strategy", ["prompt", "classification_expert"])
def test_asking_without_a_question_is_an_error(strategy: str) -> None:
    model = new_model(classification_prompt=None)
    with pytest.raises(ValueError, match=f"'{strategy}' needs a classification_prompt"):
        model.dispatch(random_prompt(), model.init_state(3, 20), strategy=strategy)
