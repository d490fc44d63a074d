"""How often the largest slice keeps what the smallest drafts, on a checkpoint that speaks."""

from __future__ import annotations

from collections.abc import Sequence

from cascade.bench.report import Acceptance
from cascade.model import ElasticModel
from cascade.reasoner import Reasoner

DRAFT = 8
MOST_TOKENS = 96  # of one answer
PROBLEMS = 12


def measured(model: ElasticModel, draft: str, verify: str) -> Acceptance | None:
    """Greedy answers to a few arithmetic questions; None without a tokenizer to ask them."""
    from cascade.problems import nano_problems
    from cascade.strategies import Stepwise

    reasoner = Reasoner(model, draft=draft, verify=verify, max_batch=1, max_length=512)
    if reasoner.codec.tokenizer is None:
        return None
    questions = [problem.question for problem in nano_problems(PROBLEMS, seed=7)]
    results = [reasoner.generate(q, strategy=Stepwise(), max_tokens=MOST_TOKENS) for q in questions]
    drafted = sum(result.usage.drafted for result in results)
    kept = sum(result.usage.accepted for result in results)
    by_token = _by_token(reasoner, questions)
    return Acceptance(by_token, kept / drafted if drafted else 0.0, "measured")


def _by_token(reasoner: Reasoner, questions: Sequence[str]) -> float:
    """Share of drafted ids that are the verifier's own choice, of those that it gets to see."""
    draft, verify = reasoner.roles.draft, reasoner.roles.verify
    kept = seen = 0
    for question in questions:
        prompt = reasoner.codec.encode_prompt(question)[1]
        with reasoner.model.sequence(cache=reasoner.cache) as row:
            row.append(prompt, verify)
            ended = False
            while not ended and row.length < len(prompt) + MOST_TOKENS:
                ids = row.draft(DRAFT, draft, until=reasoner.codec.end_ids)
                wanted = row.verify(verify).argmax(1).tolist()
                agreed = [mine == its for mine, its in zip(ids, wanted, strict=False)]
                count = agreed.index(False) if False in agreed else len(ids)
                kept, seen = kept + count, seen + min(count + 1, len(ids))
                new = [*ids[:count], wanted[count]]
                ended = bool(reasoner.codec.end_ids.intersection(new))
                row.commit(count, bonus=wanted[count])
    return kept / seen
