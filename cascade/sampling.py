"""Sampling parameters, and the one place where logits become a distribution and a token.

The draft slice and the verifying slice go through the same `Sampler`, so p and q of speculative
sampling are both taken after every filter, and q is the distribution really sampled.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

if TYPE_CHECKING:
    from torch import Tensor

_ALIASES = {"max_new_tokens": "max_tokens", "stop_strings": "stop", "min_new_tokens": "min_tokens"}


class SamplingParams(BaseModel):
    """How tokens are chosen and where generation ends. Frozen; unknown fields are refused.

    Names are vLLM's; `max_new_tokens`, `min_new_tokens`, `do_sample` and `stop_strings` are
    accepted as aliases. Unlike there, the default is greedy (`temperature=0`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: Annotated[int, Field(ge=1, description="samples per prompt")] = 1
    temperature: Annotated[float, Field(ge=0, description="0 is greedy")] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1, description="nucleus mass kept")] = 1.0
    top_k: Annotated[int, Field(ge=0, description="most likely tokens kept, 0 for all")] = 0
    min_p: Annotated[float, Field(ge=0, le=1, description="least share of the best kept")] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, description="1 is none")] = 1.0
    logit_bias: Mapping[int, float] = Field(default_factory=dict, description="added to logits")
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] = 0
    ignore_eos: bool = False
    logprobs: Annotated[int, Field(ge=0, description="most likely tokens reported")] | None = None
    thinking_token_budget: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _accept_aliases(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        values = dict(data)
        for alias, name in _ALIASES.items():
            if alias in values:
                if name in values:
                    raise ValueError(f"{alias} and {name} are the same setting; give one of them")
                values[name] = values.pop(alias)
        if "do_sample" in values:
            sample = values.pop("do_sample")
            if not sample:
                values["temperature"] = 0.0
            elif not values.get("temperature", 1.0):
                raise ValueError("do_sample=True contradicts temperature=0")
            else:
                values.setdefault("temperature", 1.0)
        return values

    @field_validator("stop", "stop_token_ids", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        if value is None:
            return ()
        return (value,) if isinstance(value, (str, int)) else tuple(value)

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("an empty stop string would stop at once")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> SamplingParams:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} > max_tokens={self.max_tokens}")
        return self

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class Sampler:
    """The distribution and the draws of one request.

    seed:          every draw depends on (seed, absolute position) alone, not on the batch
    prompt_length: tokens before the first generated one, for `min_tokens`
    ends:          ids that `min_tokens` forbids before its time
    """

    params: SamplingParams
    seed: int = field(default_factory=lambda: secrets.randbits(62))
    prompt_length: int = 0
    ends: Collection[int] = ()

    @classmethod
    def of(cls, params: SamplingParams | Sampler | None) -> Sampler:
        if isinstance(params, Sampler):
            return params
        params = GREEDY if params is None else params
        return cls(params) if params.seed is None else cls(params, params.seed)

    @property
    def is_argmax(self) -> bool:
        """Whether the next id is the likeliest one, whatever came before."""
        p = self.params
        plain = p.repetition_penalty == 1 and not p.logit_bias
        return p.greedy and plain and not (self.ends and p.min_tokens)

    def distribution(self, logits: Tensor, tokens: Seq[int]) -> Tensor:
        """Probabilities [V] of the next token after `tokens`, every filter applied.

        logits: [V] fp32. Greedy gives one probability of 1.
        """
        import torch

        p = self.params
        logits = self._adjusted(logits, tokens)
        if p.greedy:
            return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
        logits = logits / p.temperature
        if 0 < p.top_k < logits.numel():
            logits = logits.masked_fill(logits < logits.topk(p.top_k).values[-1], -torch.inf)
        probs = logits.softmax(0)
        if p.top_p < 1:
            ranked, order = probs.sort(descending=True)
            drop = ranked.cumsum(0) - ranked >= p.top_p
            probs = probs.index_fill(0, order[drop], 0.0)
        if p.min_p > 0:
            probs = probs.masked_fill(probs < p.min_p * probs.max(), 0.0)
        return probs / probs.sum()

    def sample(self, logits: Tensor, tokens: Seq[int], kernels: Any) -> tuple[int, Tensor | None]:
        """Draw the next id after `tokens`; also the distribution [V] it was drawn from.

        None stands for certainty: greedy draws have no other outcome.
        """
        import torch

        if self.params.greedy:
            return int(self._adjusted(logits, tokens).argmax()), None
        probs = self.distribution(logits, tokens)
        seed = torch.tensor([self.seed], device=probs.device)
        position = torch.tensor([len(tokens)], device=probs.device)
        return int(kernels.race_sample(probs[None], seed, position)[0]), probs

    def _adjusted(self, logits: Tensor, tokens: Seq[int]) -> Tensor:
        import torch

        p = self.params
        if p.repetition_penalty != 1:
            seen = torch.tensor(sorted(set(tokens)), device=logits.device)
            value = logits[seen]
            scaled = torch.where(
                value > 0, value / p.repetition_penalty, value * p.repetition_penalty
            )
            logits = logits.index_copy(0, seen, scaled)
        if p.logit_bias:
            ids = torch.tensor(list(p.logit_bias), device=logits.device)
            bias = torch.tensor(list(p.logit_bias.values()), device=logits.device)
            logits = logits.index_add(0, ids, bias.to(logits.dtype))
        if self.ends and len(tokens) - self.prompt_length < p.min_tokens:
            ids = torch.tensor(sorted(self.ends), device=logits.device)
            logits = logits.index_fill(0, ids, -torch.inf)
        return logits


GREEDY = SamplingParams()


def derive_seed(seed: int, request: int, sample: int) -> int:
    """A seed of its own for each request and sample of one call; (seed, 0, 0) is not changed."""
    if request == sample == 0:
        return seed
    mixed = (seed + 0x9E3779B97F4A7C15 * (request * 0x10001 + sample)) & (2**64 - 1)
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    return (mixed ^ (mixed >> 27)) & (2**62 - 1)
