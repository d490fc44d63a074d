"""What a user of `Reasoner` relies on, on nano: the real checkpoint, on the CPU."""

import asyncio
import json
import math
from dataclasses import replace

import pytest

from cascade import Reasoner, SamplingParams
from cascade.errors import PolicyError, PromptTooLong, RequestError, SliceError
from cascade.events import Done, StepCommitted
from cascade.policies import Accept, Policy, Rewrite, StepScores, Threshold
from cascade.strategies import Budget, Single, Speculative, Stepwise

QUESTION = "State the final answer to the following arithmetic problem: 57 + 87 + 70 ="
QUESTIONS = [
    QUESTION,
    "State the final answer to the following arithmetic problem: 12 - 7 =",
    (
        "Find the Greatest Common Divisor (GCD) of these numbers: 84, 36. "
        "Give only the GCD as your final answer."
    ),
    "Find the Least Common Multiple (LCM) of these numbers: 12, 18",
    "State the final answer to the following arithmetic problem: 5 + 8 - 2 =",
]


class Reject(Policy):
    """Keeps nothing that was drafted."""

    def decide(self, scores: StepScores) -> Rewrite:
        return Rewrite(start=0)


class Keep(Policy):
    """Keeps everything that was drafted."""

    def decide(self, scores: StepScores) -> Accept:
        return Accept()


@pytest.fixture(scope="module")
def reasoner() -> Reasoner:
    return Reasoner.from_pretrained("nano", max_batch=4, max_length=384)


def test_a_problem_is_solved_with_visible_steps(reasoner: Reasoner) -> None:
    result = reasoner.generate(QUESTION)
    assert result.answer == "214"
    assert result.finish_reason == "stop"
    assert result.reasoning and "214" in result.reasoning
    assert "".join(step.text or "" for step in result.steps) == result.text
    assert sum(step.tokens for step in result.steps) == len(result.token_ids)


def test_a_bare_expression_is_enough(reasoner: Reasoner) -> None:
    assert reasoner.generate("57 + 87 + 70").answer == "214"


def test_usage_adds_up(reasoner: Reasoner) -> None:
    usage = reasoner.generate(QUESTION).usage
    result = reasoner.generate(QUESTION)
    assert usage.completion == len(result.token_ids) == sum(usage.by_slice.values())
    assert usage.prompt == len(result.prompt_token_ids)
    assert usage.accepted + usage.rewritten == usage.completion
    assert usage.drafted >= usage.accepted
    assert sum(usage.thinking_by_slice.values()) == usage.reasoning


def test_greedy_is_deterministic(reasoner: Reasoner) -> None:
    first, second = (reasoner.generate(QUESTION, temperature=0) for _ in range(2))
    assert first.token_ids == second.token_ids


def test_stepwise_at_one_half_writes_what_large_alone_writes(reasoner: Reasoner) -> None:
    """A token of probability above 1/2 is the most likely one."""
    together = reasoner.generate(QUESTIONS)
    alone = reasoner.generate(QUESTIONS, strategy=Single(slice="large"))
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]


def test_a_list_keeps_its_order_and_equals_one_by_one(reasoner: Reasoner) -> None:
    together = reasoner.generate(QUESTIONS)
    for question, result in zip(QUESTIONS, together, strict=True):
        assert result.token_ids == reasoner.generate(question).token_ids


def test_no_prompts_have_no_results(reasoner: Reasoner) -> None:
    assert reasoner.generate([]) == []


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(reasoner: Reasoner) -> None:
    params = [SamplingParams(temperature=1.0, seed=i) for i in range(len(QUESTIONS))]
    together = reasoner.generate(QUESTIONS, params, strategy="single")
    for question, setting, result in zip(QUESTIONS, params, together, strict=True):
        alone = reasoner.generate(question, setting, strategy="single")
        assert alone.token_ids == result.token_ids


def test_requests_of_one_call_do_not_share_their_random_numbers(reasoner: Reasoner) -> None:
    results = reasoner.generate(
        [QUESTION] * 4, strategy=Single(slice="small"), temperature=5.0, seed=7
    )
    assert len({r.token_ids for r in results}) > 1
    assert len({r.seed for r in results}) == 4


def test_n_samples_come_in_one_result(reasoner: Reasoner) -> None:
    result = reasoner.generate(
        QUESTION, n=3, temperature=1.5, seed=1, strategy=Single(slice="small")
    )
    assert len(result.samples) == 3
    assert result.samples[0].token_ids == result.token_ids
    assert len({s.seed for s in result.samples}) == 3


def test_chat_messages_and_ids_are_prompts_too(reasoner: Reasoner) -> None:
    plain = reasoner.generate(QUESTION)
    chat = reasoner.generate([{"role": "user", "content": QUESTION}])
    ids = reasoner.generate({"prompt_token_ids": list(plain.prompt_token_ids)})
    assert plain.token_ids == chat.token_ids == ids.token_ids


def test_single_runs_one_slice_alone(reasoner: Reasoner) -> None:
    result = reasoner.generate(QUESTION, strategy=Single(slice="small"))
    assert set(result.usage.by_slice) == {"small"}
    assert set(result.metrics.passes) == {"small"}
    assert result.usage.drafted == 0


def test_a_policy_that_rejects_all_leaves_everything_to_large(reasoner: Reasoner) -> None:
    result = reasoner.generate(QUESTION, policy=Reject())
    assert set(result.usage.by_slice) == {"large"}
    assert all(step.decision == "rewrite" for step in result.steps)
    assert result.token_ids == reasoner.generate(QUESTION, strategy="single").token_ids


def test_a_policy_that_keeps_all_leaves_everything_to_small(reasoner: Reasoner) -> None:
    result = reasoner.generate(QUESTION, policy=Keep())
    assert set(result.usage.by_slice) == {"small"}
    assert result.metrics.acceptance_rate == 1.0


@pytest.mark.parametrize("policy", [Threshold(), Reject(), Keep()])
def test_the_cache_is_the_verifiers_after_a_run(reasoner: Reasoner, policy: Policy) -> None:
    reasoner = Reasoner(reasoner.model, policy=policy, max_batch=1, max_length=384)
    report = reasoner.audit(QUESTION)
    assert report.max_relative_error <= 1e-4


def test_stop_strings_cut_text_and_tokens_inside_an_accepted_step(reasoner: Reasoner) -> None:
    whole = reasoner.generate(QUESTION)
    cut = reasoner.generate(QUESTION, stop="214")
    assert whole.text and cut.text is not None and "214" in whole.text
    assert cut.text == whole.text.split("214")[0]
    assert cut.finish_reason == "stop"
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert sum(cut.usage.by_slice.values()) == len(cut.token_ids)
    assert "".join(step.text or "" for step in cut.steps) == cut.text


def test_stop_token_ids_end_generation(reasoner: Reasoner) -> None:
    plus = reasoner.codec.encode("+")[0]
    result = reasoner.generate(QUESTION, stop_token_ids=[plus])
    assert result.finish_reason == "stop"
    assert result.token_ids[-1] == plus and plus not in result.token_ids[:-1]


@pytest.mark.parametrize("limit", [1, 5, 17])
def test_max_tokens_is_exact(reasoner: Reasoner, limit: int) -> None:
    result = reasoner.generate(QUESTION, max_new_tokens=limit)
    assert len(result.token_ids) == limit
    assert result.finish_reason == "length"


def test_min_tokens_holds_the_end_back(reasoner: Reasoner) -> None:
    usual = len(reasoner.generate(QUESTION, strategy="single").token_ids)
    longer = reasoner.generate(
        QUESTION, strategy="single", min_tokens=usual + 5, max_tokens=usual + 20
    )
    assert len(longer.token_ids) >= usual + 5


def test_a_thinking_budget_ends_the_thought_on_a_line_of_its_own(reasoner: Reasoner) -> None:
    result = reasoner.generate(QUESTION, thinking_token_budget=6)
    assert result.text and result.reasoning is not None
    assert result.text.startswith(result.reasoning + "\n</think>")
    assert any(step.decision == "forced" for step in result.steps)
    assert result.answer


def test_logprobs_come_one_for_each_token(reasoner: Reasoner) -> None:
    result = reasoner.generate(QUESTION, logprobs=2)
    assert result.logprobs is not None and len(result.logprobs) == len(result.token_ids)
    for token, entry in zip(result.token_ids, result.logprobs, strict=True):
        assert entry[token] <= 0 and len(entry) in (2, 3)


def test_stream_ends_with_the_result_that_generate_gives(reasoner: Reasoner) -> None:
    events = list(reasoner.stream(QUESTION))
    assert isinstance(events[-1], Done)
    assert events[-1].result.token_ids == reasoner.generate(QUESTION).token_ids
    committed = [e.step for e in events if isinstance(e, StepCommitted)]
    assert tuple(committed) == events[-1].result.steps


def test_the_text_stream_shows_committed_text_only(reasoner: Reasoner) -> None:
    result = reasoner.generate(QUESTION, policy=Reject())
    assert "".join(reasoner.stream_text(QUESTION, policy=Reject())) == result.text


def test_closing_a_stream_frees_its_slot(reasoner: Reasoner) -> None:
    stream = reasoner.stream(QUESTION)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert reasoner.cache.free_slots == reasoner.cache.max_batch
    assert reasoner.generate(QUESTION).answer == "214"


def test_async_generation_does_not_block_the_loop(reasoner: Reasoner) -> None:
    async def both() -> tuple[str | None, int]:
        ticks = 0
        task = asyncio.ensure_future(reasoner.agenerate(QUESTION))
        while not task.done():
            await asyncio.sleep(0.002)
            ticks += 1
        return task.result().answer, ticks

    answer, ticks = asyncio.run(both())
    assert answer == "214" and ticks > 1


def test_cancelling_stops_the_work(reasoner: Reasoner) -> None:
    async def cancel() -> None:
        task = asyncio.ensure_future(reasoner.agenerate(QUESTION))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert reasoner.cache.free_slots == reasoner.cache.max_batch


def test_a_policy_that_fails_ends_its_request_alone(reasoner: Reasoner) -> None:
    class Broken(Policy):
        def decide(self, scores: StepScores) -> Accept:
            if scores.step == 1:
                raise ZeroDivisionError("no such thing")
            return Accept()

    with pytest.raises(PolicyError, match="no such thing"):
        reasoner.generate(QUESTION, policy=Broken())
    one_step = "State the final answer to the following arithmetic problem: 12 - 7 ="
    results = reasoner.generate([QUESTION, one_step, QUESTION], policy=Broken())
    assert results[0].finish_reason == "error" and "no such thing" in results[0].error
    assert reasoner.cache.free_slots == reasoner.cache.max_batch


def test_nonsense_from_a_policy_is_an_error_that_says_so(reasoner: Reasoner) -> None:
    class Nonsense(Policy):
        def decide(self, scores: StepScores) -> Accept:
            return "accept"  # type: ignore[return-value]

    with pytest.raises(PolicyError, match="decisions are"):
        reasoner.generate(QUESTION, policy=Nonsense())


def test_results_are_json(reasoner: Reasoner) -> None:
    data = json.loads(reasoner.generate(QUESTION).to_json())
    assert data["answer"] == "214"
    assert data["steps"][0]["tokens"] == len(data["steps"][0]["token_ids"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": "  \n"}, "empty"),
        ({"prompt": {"prompt_token_ids": []}}, "empty"),
        ({"prompt": {"prompt_token_ids": [10**6]}}, "1000000"),
        ({"prompt": {"tokens": [1]}}, "prompt_token_ids"),
        ({"prompt": QUESTION, "temprature": 1}, "did you mean 'temperature'"),
        ({"prompt": QUESTION, "temperature": -1}, "temperature"),
        ({"prompt": QUESTION, "top_p": 1.5}, "top_p"),
        ({"prompt": QUESTION, "strategy": "stepwize"}, "did you mean 'stepwise'"),
        ({"prompt": QUESTION, "thinking_token_budget": 50, "max_tokens": 10}, "max_tokens"),
        ({"prompt": QUESTION, "max_tokens": 5, "max_new_tokens": 5}, "same setting"),
        ({"prompt": QUESTION, "presence_penalty": 3}, "presence_penalty"),
        ({"prompt": QUESTION, "logit_bias": {999: 1}}, "token id 999"),
        ({"prompt": QUESTION, "logit_bias": dict.fromkeys(range(128), -math.inf)}, "forbid every"),
        ({"prompt": QUESTION, "best_of": 2}, "unknown sampling parameter 'best_of'"),
        ({"prompt": QUESTION, "policy": "treshold"}, "did you mean 'threshold'"),
        ({"prompt": QUESTION, "policy": 3}, "a policy is a name"),
        ({"prompt": QUESTION, "policy": {"kind": "threshold", "probability": 7}}, "probability=7"),
        ({"prompt": QUESTION, "strategy": 3}, "a strategy is a name"),
        ({"prompt": QUESTION, "strategy": Stepwise(draft="large", verify="small")}, "swap them"),
        ({"prompt": QUESTION, "strategy": Speculative(draft="large", verify="medium")}, "swap"),
        ({"prompt": QUESTION, "strategy": Budget(budget=50), "max_tokens": 10}, "budget=50"),
        ({"prompt": [QUESTION] * 2, "params": [SamplingParams()]}, "2 prompts, but 1"),
        ({"prompt": QUESTION, "params": {"temperature": 1}}, "params must be SamplingParams"),
    ],
)
def test_bad_input_raises_before_any_work(
    reasoner: Reasoner, arguments: dict, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        reasoner.generate(**arguments)


def test_unknown_slices_are_refused_with_the_known_ones(reasoner: Reasoner) -> None:
    with pytest.raises(SliceError, match="did you mean 'small'"):
        reasoner.generate(QUESTION, strategy=Single(slice="smal"))
    with pytest.raises(SliceError, match="Known"):
        Reasoner(reasoner.model, draft="tiny")


def test_draft_must_not_be_larger_than_verify(reasoner: Reasoner) -> None:
    with pytest.raises(RequestError, match="larger"):
        Reasoner(reasoner.model, draft="large", verify="small")


def test_a_prompt_longer_than_the_cache_is_refused(reasoner: Reasoner) -> None:
    with pytest.raises(PromptTooLong, match="max_length=384"):
        reasoner.generate("1 + " * 400 + "1")


def test_generation_ends_where_the_cache_ends(reasoner: Reasoner) -> None:
    ids = reasoner.codec.encode_prompt(QUESTION)[1]
    short = Reasoner(reasoner.model, max_batch=1, max_length=len(ids) + 8)
    result = short.generate({"prompt_token_ids": ids})
    assert result.finish_reason == "length"
    assert len(result.token_ids) == 8


def test_a_strategy_object_overrides_slices_and_policy(reasoner: Reasoner) -> None:
    result = reasoner.generate(QUESTION, strategy=Stepwise(draft="medium", policy=Keep()))
    assert set(result.usage.by_slice) == {"medium"}


def test_a_policy_is_named_or_stored(reasoner: Reasoner) -> None:
    stored = {"kind": "threshold", "score": "mean", "probability": 0.9}
    by_object = reasoner.generate(QUESTION, policy=Threshold(score="mean", probability=0.9))
    assert reasoner.generate(QUESTION, policy=stored).token_ids == by_object.token_ids
    assert reasoner.generate(QUESTION, policy="gate").usage.unverified > 0
    named = Reasoner(reasoner.model, policy="always", max_batch=1, max_length=384)
    assert named.roles.policy.kind == "always"  # type: ignore[attr-defined]


def test_params_survive_a_copy(reasoner: Reasoner) -> None:
    params = SamplingParams(temperature=0.5, seed=3)
    first = reasoner.generate(QUESTION, params)
    assert first == replace(first)
    assert reasoner.generate(QUESTION, params).token_ids == first.token_ids
