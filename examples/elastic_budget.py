"""Elastic budget control: the small slice thinks under a budget, the large one answers.

python examples/elastic_budget.py

The thought ends cleanly at a line where one ends near the budget. At the switch the cache is made
exact (the thought is run once more) or read as it is; both costs are shown.
"""

from cascade import Reasoner
from cascade.problems import nano_problems
from cascade.strategies import Budget


def main() -> None:
    reasoner = Reasoner.from_pretrained("nano", max_batch=16)
    problems = nano_problems(24, seed=71993)
    questions = [problem.question for problem in problems]
    print("budget  switch  right  thought  run again  seconds")
    for budget in (16, 128):
        for switch in ("exact", "shared"):
            strategy = Budget(think="small", answer="large", budget=budget, switch=switch)
            results = reasoner.generate(questions, strategy=strategy)
            right = sum(p.score(r.answer) == 1 for p, r in zip(problems, results, strict=True))
            thought = sum(r.usage.reasoning for r in results) / len(results)
            again = sum(r.metrics.refreshed for r in results)
            seconds = sum(r.metrics.refresh_seconds for r in results)
            print(f"{budget:6}  {switch:6}  {right:5}  {thought:7.1f}  {again:9}  {seconds:7.2f}")


if __name__ == "__main__":
    main()
