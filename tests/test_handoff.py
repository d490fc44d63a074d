"""Whether slices can read each other's cache is measured: nano's can, untrained slices cannot."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from cascade import ElasticModel, Reasoner, problems
from cascade.cli import app
from cascade.errors import RequestError
from cascade.handoff import handoff_report
from cascade.shapes import random_model


def nano_prompts(count: int) -> list[str]:
    return [problem.question for problem in problems.nano_problems(count, 17)]


def test_nano_s_slices_read_each_other_s_cache() -> None:
    reasoner = Reasoner.from_pretrained("nano", max_batch=2, max_length=256)
    ids = [reasoner.codec.encode_prompt(prompt)[1] for prompt in nano_prompts(6)]
    report = handoff_report(reasoner.model, ids, until=reasoner.codec.end_ids, cache=reasoner.cache)
    assert report.can_share, report
    assert "shared" in report.recommendation
    assert len(report.pairs) == 6
    assert all(pair.tokens >= 64 and pair.agreement > 0.95 for pair in report.pairs)


@pytest.fixture(scope="module")
def untrained() -> ElasticModel:
    return random_model("tiny")


def test_untrained_slices_do_not(untrained: ElasticModel) -> None:
    names = list(untrained.slices)
    report = handoff_report(untrained, [[5, 6, 7, 8, 9]], slices=[names[0], names[-1]], tokens=64)
    assert not report.can_share
    assert 'draft_cache="own"' in report.recommendation or "exact" in report.recommendation
    assert all(pair.excess > 0.02 for pair in report.pairs)


def test_too_little_text_and_too_few_slices_are_refused(untrained: ElasticModel) -> None:
    with pytest.raises(RequestError, match="two slices"):
        handoff_report(untrained, [[5]], slices=[untrained.largest])
    with pytest.raises(RequestError, match="no prompts"):
        handoff_report(untrained, [])
    everything = range(untrained.arch.vocab_size)
    with pytest.raises(RequestError, match="too few"):
        handoff_report(untrained, [[5]], until=everything)


def test_the_command_line_prints_the_report() -> None:
    result = CliRunner().invoke(app, ["audit", "--handoff", "--json", *nano_prompts(6)])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    assert facts["can_share"] is True
    assert {(p["writer"], p["reader"]) for p in facts["pairs"]} >= {("small", "large")}
