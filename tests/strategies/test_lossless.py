"""Speculative sampling leaves the verifier's distribution as it is: chi-square, exact references.

Each test draws a thousand short outputs under fixed seeds and compares the frequencies of whole
outputs with their exact probabilities, which the verifying slice alone gives by enumeration. Were
the seeds fresh, each comparison would fail wrongly once in 10,000 times (`ALPHA`).
"""

from __future__ import annotations

import pytest
import torch

from cascade import Reasoner, SamplingParams
from cascade.model import ElasticModel
from cascade.sampling import Sampler
from cascade.strategies import Single, Speculative
from tests.chisquare import p_value
from tests.nested import elastic, parent

ALPHA = 1e-4
PROMPT = [1, 4, 2, 6, 3]
VOCABULARY, LENGTH = 8, 3
SETTINGS = {
    "plain": {"temperature": 1.0},
    "hot, top-k": {"temperature": 1.7, "top_k": 5},
    "cool, top-p": {"temperature": 0.7, "top_p": 0.8},
    "min-p and bias": {"temperature": 1.3, "min_p": 0.1, "logit_bias": {3: 1.5, 5: -2.0}},
    "all penalties": {
        "temperature": 1.2,
        "repetition_penalty": 1.4,
        "presence_penalty": 0.8,
        "frequency_penalty": 0.5,
    },
    "held back": {"temperature": 1.0, "min_tokens": 2, "stop_token_ids": [0, 7]},
}


def model(sharpness: float = 1.0) -> ElasticModel:
    """Three slices that disagree; sharpness multiplies their logits."""
    source = parent("MEM*E", seed=3, vocab_size=VOCABULARY, eos_token_id=0)
    source.lm_head.weight.mul_(sharpness)
    return elastic(source)


@pytest.fixture(scope="module")
def reasoner() -> Reasoner:
    return Reasoner(model(), max_batch=100, max_length=16)


def exact(reasoner: Reasoner, params: SamplingParams) -> dict[tuple[int, ...], float]:
    """The probability of every output of at most LENGTH tokens by the verifying slice alone."""
    ends = frozenset(reasoner.codec.end_ids | set(params.stop_token_ids))
    sampler = Sampler(params, 0, len(PROMPT), ends)
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        longer: dict[tuple[int, ...], float] = {}
        for output, probability in found.items():
            if output and output[-1] in ends:
                longer[output] = probability
                continue
            with reasoner.model.sequence() as sequence:
                logits = sequence.append([*PROMPT, *output], "large")
            row = sampler.distribution(logits, [*PROMPT, *output]).double()
            for token, p in enumerate(row.tolist()):
                if p:
                    longer[*output, token] = probability * p
        found = longer
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    return found


def outputs(
    reasoner: Reasoner, strategy: Speculative | Single, params: SamplingParams, count: int
) -> tuple[list[tuple[int, ...]], float]:
    """Outputs under `count` seeds, and the share of drafted tokens that was kept."""
    prompts = [{"prompt_token_ids": PROMPT}] * count
    results = reasoner.generate(prompts, params, strategy=strategy, max_tokens=LENGTH, seed=5)
    assert {result.error for result in results} == {None}
    drafted = sum(result.usage.drafted for result in results)
    accepted = sum(result.usage.accepted for result in results)
    return [result.token_ids for result in results], accepted / max(drafted, 1)


@pytest.mark.parametrize("setting", SETTINGS)
def test_maximal_coupling_draws_from_the_verifiers_distribution(
    reasoner: Reasoner, setting: str
) -> None:
    params = SamplingParams(**SETTINGS[setting])
    strategy = Speculative(coupling="maximal", draft_tokens=2)
    drawn, accepted = outputs(reasoner, strategy, params, 1000)
    assert 0.02 < accepted < 0.98  # both branches are taken
    assert p_value(drawn, exact(reasoner, params)) > ALPHA


@pytest.mark.parametrize("setting", SETTINGS)
def test_common_coupling_draws_what_single_draws_seed_by_seed(
    reasoner: Reasoner, setting: str
) -> None:
    params = SamplingParams(**SETTINGS[setting])
    alone, _ = outputs(reasoner, Single(), params, 200)
    for k in (1, 2):
        drawn, accepted = outputs(reasoner, Speculative(draft_tokens=k), params, 200)
        assert 0.02 < accepted < 0.98
        assert drawn == alone


def test_single_itself_draws_from_the_distribution(reasoner: Reasoner) -> None:
    params = SamplingParams(**SETTINGS["all penalties"])
    drawn, _ = outputs(reasoner, Single(), params, 1000)
    assert p_value(drawn, exact(reasoner, params)) > ALPHA


@pytest.mark.parametrize("coupling", ["common", "maximal"])
def test_a_confidently_wrong_drafter_changes_nothing(coupling: str) -> None:
    """Logits four times as large: the drafter is sure of itself, and mostly wrong."""
    sure = Reasoner(model(sharpness=4.0), max_batch=100, max_length=16)
    params = SamplingParams(temperature=1.0)
    with sure.model.sequence() as sequence:
        sequence.append(PROMPT, "large")
        sequence.draft(1, "small", params)
        assert float(sequence.proposals[0].max()) > 0.9
    strategy = Speculative(coupling=coupling, draft_tokens=2)
    drawn, accepted = outputs(sure, strategy, params, 1000)
    assert accepted < 0.3
    assert p_value(drawn, exact(sure, params)) > ALPHA


def test_a_wrong_rule_is_noticed(reasoner: Reasoner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistakes that others have made: each of them fails the test above by a wide margin."""
    params = SamplingParams(**SETTINGS["cool, top-p"])
    expected = exact(reasoner, params)
    right, strategy = (
        reasoner.model.kernels.accept_resample,
        Speculative(coupling="maximal", draft_tokens=2),
    )

    def q_without_filters(target, draft, *rest):  # transformers#32867
        return right(target, torch.full_like(draft, 1 / VOCABULARY), *rest)

    def keeps_all(target, draft, ids, counts, *rest):
        _, following = right(target, target[:, :-1], ids, counts, *rest)
        return counts.clone(), following

    def resamples_from_p(target, draft, ids, counts, seeds, positions):
        accepted, _ = right(target, draft, ids, counts, seeds, positions)
        row = target[torch.arange(len(accepted)), accepted]
        return accepted, reasoner.model.kernels.race_sample(row, seeds, positions + accepted, 2)

    for wrong in (q_without_filters, keeps_all, resamples_from_p):
        monkeypatch.setattr(reasoner.model.kernels, "accept_resample", wrong)
        drawn, _ = outputs(reasoner, strategy, params, 1000)
        assert p_value(drawn, expected) < 1e-8


def test_the_statistic_knows_right_from_wrong() -> None:
    fair = dict.fromkeys(range(6), 1 / 6)
    throws = torch.randint(0, 6, (3000,), generator=torch.Generator().manual_seed(1)).tolist()
    assert p_value(throws, fair) > ALPHA
    assert p_value([*throws, *[3] * 250], fair) < ALPHA
    assert p_value([9], fair) == 0
