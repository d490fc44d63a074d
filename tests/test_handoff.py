"""Whether slices can read each other's cache is measured: nano's can, untrained slices cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cascade import ElasticModel, Reasoner, problems
from cascade.cache import DraftCache
from cascade.cli import app
from cascade.errors import RequestError
from cascade.fetch import NANO_DIRECTORY
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
    assert 'consistency="exact" with draft_cache="own"' in report.recommendation
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


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano's checkpoint with the numbers of every matrix in a random order."""
    directory = tmp_path_factory.mktemp("checkpoints") / "shuffled"
    shutil.copytree(NANO_DIRECTORY, directory)
    generator = torch.Generator().manual_seed(3)
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        for tensor in tensors.values():
            if tensor.dim() > 1:
                order = torch.randperm(tensor.numel(), generator=generator)
                tensor.copy_(tensor.flatten()[order].view_as(tensor))
        save_file(tensors, file, metadata={"format": "pt"})
    return directory


def test_the_command_line_recommends_a_draft_cache_of_its_own(shuffled: Path) -> None:
    arguments = ["audit", "--handoff", "--json", "--model", str(shuffled), *nano_prompts(8)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    assert facts["can_share"] is False
    assert 'consistency="exact" with draft_cache="own"' in facts["recommendation"]
    run = ["run", "1 + 1", "--max-tokens", "20", "--json", "--draft-cache", "own"]
    result = CliRunner().invoke(app, [*run, "--model", str(shuffled)])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["usage"]["drafted"] > 0


@pytest.mark.parametrize("draft_cache", ["own", "shared"])
def test_what_it_recommends_drafts_what_the_slice_alone_would(
    shuffled: Path, draft_cache: DraftCache
) -> None:
    """Greedy, 8 ids at a time, behind text that the large slice verifies."""
    reasoner = Reasoner.from_pretrained(shuffled, max_batch=2, max_length=256, draft_cache="own")
    model, same, drafted = reasoner.model, 0, 0
    _, prompt = reasoner.codec.encode_prompt(nano_prompts(1)[0])
    with model.sequence(cache=reasoner.cache, draft_cache=draft_cache) as sequence:
        sequence.append(prompt, "large")
        for _ in range(8):
            ids = sequence.draft(8, "small")
            with model.sequence(cache=reasoner.cache) as alone:
                alone.append(sequence.tokens, "small")
                expected = alone.draft(8, "small")
            same += sum(a == b for a, b in zip(ids, expected, strict=True))
            drafted += len(ids)
            best = sequence.verify("large").argmax(1).tolist()
            kept = next((i for i, token in enumerate(ids) if token != best[i]), len(ids))
            sequence.commit(kept, bonus=best[kept])
        assert sequence.audit("large").ok
    assert drafted == 64
    assert (same == drafted) == (draft_cache == "own")
