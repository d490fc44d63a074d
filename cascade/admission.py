"""What is checked, and made of a caller's arguments, before any work."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from pydantic import ValidationError

from cascade.cache import Cache
from cascade.errors import PromptTooLong, RequestError, unknown
from cascade.model import ElasticModel
from cascade.policies import Policy, Threshold, build, load
from cascade.policies.storage import SUFFIXES
from cascade.sampling import SamplingParams
from cascade.text import Codec


def resolve_policy(policy: object) -> Policy:
    """A policy by name, by its stored settings, or itself; None is `Threshold()`.

    Raises RequestError for anything else.
    """
    if policy is None:
        return Threshold()
    try:
        found = build(policy)
    except ValidationError as error:
        raise RequestError(f"policy {policy!r}: {_findings(error)}") from None
    except ValueError as error:  # an unknown name
        raise RequestError(str(error)) from None
    if not isinstance(found, Policy):
        raise RequestError(
            f"a policy is a name, a mapping with its `kind`, or a Policy, got {policy!r}"
        )
    return found


def read_policy(source: str) -> Policy:
    """A policy by name, or from a `.json` or `.yaml` file. Raises RequestError."""
    if not source.endswith(SUFFIXES):
        return resolve_policy(source)
    try:
        return load(source)
    except ValueError as error:
        raise RequestError(str(error)) from None


def params_for(count: int, params: object, overrides: Mapping[str, Any]) -> list[SamplingParams]:
    """The sampling parameters of `count` prompts. Raises RequestError."""
    if isinstance(params, (list, tuple)):
        if len(params) != count:
            raise RequestError(f"{count} prompts, but {len(params)} SamplingParams")
        each = list(params)
    else:
        each = [SamplingParams() if params is None else params] * count
    for one in each:
        if not isinstance(one, SamplingParams):
            raise RequestError(f"params must be SamplingParams, got {type(one).__name__}")
    if not overrides:
        return each
    try:
        changes = SamplingParams.model_validate(dict(overrides)).model_dump(exclude_unset=True)
        return [
            SamplingParams.model_validate(p.model_dump(exclude_unset=True) | changes) for p in each
        ]
    except ValidationError as error:
        raise RequestError(_findings(error)) from None


def check_request(
    ids: Seq[int], params: SamplingParams, model: ElasticModel, cache: Cache, codec: Codec
) -> None:
    """Raises RequestError for a prompt or parameters that could not be served as asked."""
    vocab = model.arch.vocab_size
    outside = [i for i in ids if not 0 <= i < vocab]
    if outside:
        raise RequestError(f"prompt token id {outside[0]} is not in [0, {vocab})")
    if len(ids) >= cache.max_length:
        raise PromptTooLong(
            f"the prompt has {len(ids)} tokens; max_length={cache.max_length} must leave "
            "room for at least one more. Give Reasoner a larger max_length"
        )
    if params.stop and codec.tokenizer is None:
        raise RequestError("stop strings need a tokenizer; use stop_token_ids")
    for token in (*params.stop_token_ids, *params.logit_bias):
        if not 0 <= token < vocab:
            raise RequestError(
                f"token id {token} in stop_token_ids or logit_bias is not in [0, {vocab})"
            )
    forbidden = {token for token, bias in params.logit_bias.items() if bias == float("-inf")}
    if params.min_tokens:
        forbidden |= codec.end_ids | set(params.stop_token_ids)
    if len(forbidden) >= vocab:
        raise RequestError("logit_bias and min_tokens forbid every token of the vocabulary")
    budget = params.thinking_token_budget
    if budget is not None and params.max_tokens is not None and budget > params.max_tokens:
        raise RequestError(
            f"thinking_token_budget={budget} is beyond max_tokens={params.max_tokens}"
        )
    if budget is not None and not codec.has_thoughts:
        raise RequestError(
            f"thinking_token_budget={budget} has no meaning here: this tokenizer has no tags "
            f"{codec.think} and {codec.end_think}; name others with Reasoner(think_tags=...)"
        )


def _findings(error: ValidationError) -> str:
    """pydantic's findings in one sentence, unknown names with the known ones."""
    parts = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden" and error.title == "SamplingParams":
            parts.append(unknown("sampling parameter", name, SamplingParams.model_fields))
        else:
            parts.append(f"{name}={item['input']!r}: {item['msg']}" if name else str(item["msg"]))
    return "; ".join(parts)
