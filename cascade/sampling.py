"""Sampling parameters, and the one place where logits become a distribution and a token.

The draft slice and the verifying slice go through the same `Sampler`, so p and q of speculative
sampling are both taken after every filter, and q is the distribution really sampled.
"""

from __future__ import annotations

import math
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
    accepted as aliases. Unlike there, the default is greedy (`temperature=0`). In their order:
    repetition penalty (over prompt and output), presence and frequency penalty (over the output),
    bias, `min_tokens`, temperature, top-k, top-p, min-p.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: Annotated[int, Field(ge=1, description="samples per prompt")] = 1
    temperature: Annotated[float, Field(ge=0, description="0 is greedy")] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1, description="nucleus mass kept")] = 1.0
    top_k: Annotated[int, Field(ge=-1, description="most likely tokens kept, 0 or -1 for all")] = 0
    min_p: Annotated[float, Field(ge=0, le=1, description="least share of the best kept")] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, description="1 is none")] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2, description="a token written")] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, description="each time written")] = 0.0
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

    @field_validator("logit_bias")
    @classmethod
    def _below_infinity(cls, value: Mapping[int, float]) -> Mapping[int, float]:
        if any(math.isnan(bias) or bias == math.inf for bias in value.values()):
            raise ValueError("a bias is a number; -inf forbids a token")
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

    seed:          every draw depends on (seed, absolute position) alone, neither on the batch nor
                   on the slice: two slices of one distribution draw the same token
    prompt_length: tokens before the first generated one, for `min_tokens` and the penalties
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
        if params is None:
            return GREEDY  # one for all rows: it draws nothing
        return cls(params) if params.seed is None else cls(params, params.seed)

    @property
    def needs_only_logits(self) -> bool:
        """Whether the next distribution depends on nothing that came before."""
        p = self.params
        penalties = p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty
        return not (penalties or p.logit_bias or (self.ends and p.min_tokens))

    @property
    def filters(self) -> tuple[float, ...]:
        """What turns logits into a distribution, where nothing else does."""
        return self.params.temperature, self.params.top_k, self.params.top_p, self.params.min_p

    def distribution(self, logits: Tensor, tokens: Seq[int]) -> Tensor:
        """Probabilities [V] of the next token after `tokens`; see `distributions`."""
        return self.distributions(logits[None], tokens)[0]

    def distributions(self, logits: Tensor, tokens: Seq[int], drafted: Seq[int] = ()) -> Tensor:
        """Probabilities [m, V], every filter applied; greedy gives one probability of 1.

        logits: [m, V] fp32; row i predicts the token after `tokens` and the first i of `drafted`.
        """
        import torch

        p = self.params
        logits = self.adjusted(logits, tokens, drafted)
        if p.greedy:
            best = logits.argmax(-1, keepdim=True)
            return torch.zeros_like(logits).scatter_(-1, best, 1.0)
        logits = (logits - logits.amax(-1, keepdim=True)) / p.temperature
        if 0 < p.top_k < logits.shape[-1]:
            least = logits.topk(p.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        probs = logits.softmax(-1)
        if p.top_p < 1:
            ranked, order = probs.sort(dim=-1, descending=True, stable=True)
            dropped = ranked.cumsum(-1) - ranked >= p.top_p
            probs = probs.scatter(-1, order, ranked.masked_fill(dropped, 0.0))
        if p.min_p > 0:
            probs = probs.masked_fill(probs < p.min_p * probs.amax(-1, keepdim=True), 0.0)
        return probs / probs.sum(-1, keepdim=True)

    def sample(self, logits: Tensor, tokens: Seq[int], kernels: Any) -> tuple[int, Tensor | None]:
        """Draw the next id after `tokens`; also the distribution [V] it was drawn from.

        None stands for certainty: greedy draws have no other outcome.
        """
        if self.params.greedy:
            return int(self.adjusted(logits[None], tokens)[0].argmax()), None
        probs = self.distribution(logits, tokens)
        return self.draw(probs[None], len(tokens), kernels)[0], probs

    def draw(self, probs: Tensor, position: int, kernels: Any) -> list[int]:
        """One id from each of the distributions [m, V] at positions from `position` on."""
        import torch

        if self.params.greedy:
            best: list[int] = probs.argmax(-1).tolist()
            return best
        positions = torch.arange(position, position + len(probs), device=probs.device)
        seeds = torch.full_like(positions, self.seed)
        drawn: list[int] = kernels.race_sample(probs, seeds, positions).tolist()
        return drawn

    def adjusted(self, logits: Tensor, tokens: Seq[int], drafted: Seq[int] = ()) -> Tensor:
        """Logits [m, V] after penalties, bias and `min_tokens`; rows as in `distributions`."""
        import torch

        p, device = self.params, logits.device
        if p.repetition_penalty != 1:
            seen = _counts(tokens, drafted, logits) > 0
            scaled = torch.where(
                logits > 0, logits / p.repetition_penalty, logits * p.repetition_penalty
            )
            logits = torch.where(seen, scaled, logits)
        if p.presence_penalty or p.frequency_penalty:
            written = _counts(tokens[self.prompt_length :], drafted, logits)
            logits = logits - p.frequency_penalty * written - p.presence_penalty * (written > 0)
        if p.logit_bias:
            ids = torch.tensor(list(p.logit_bias), device=device)
            bias = torch.tensor(list(p.logit_bias.values()), device=device)
            logits = logits.index_add(-1, ids, bias.to(logits.dtype).expand(len(logits), -1))
        early = p.min_tokens - (len(tokens) - self.prompt_length)
        if self.ends and early > 0:
            ids = torch.tensor(sorted(self.ends), device=device)
            held = logits[:early].index_fill(-1, ids, -torch.inf)
            logits = torch.cat([held, logits[early:]])
        return logits


def _counts(tokens: Seq[int], drafted: Seq[int], logits: Tensor) -> Tensor:
    """How often each id stands in `tokens` and the first i of `drafted`: [m, V] like `logits`."""
    import torch

    rows, size = logits.shape
    before = torch.tensor(list(tokens), dtype=torch.int64, device=logits.device)
    counts = before.bincount(minlength=size).repeat(rows, 1)
    for i, token in enumerate(drafted[: rows - 1], 1):
        counts[i:, token] += 1
    return counts


GREEDY = Sampler(SamplingParams(), seed=0)


def derive_seed(seed: int, request: int, sample: int) -> int:
    """A seed of its own for each request and sample of one call; (seed, 0, 0) is not changed."""
    if request == sample == 0:
        return seed
    mixed = (seed + 0x9E3779B97F4A7C15 * (request * 0x10001 + sample)) & (2**64 - 1)
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    return (mixed ^ (mixed >> 27)) & (2**62 - 1)
