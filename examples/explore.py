"""Many small drafts from one prefix, judged by the large slice in one batched pass.

python examples/explore.py
"""

from cascade import Reasoner
from cascade.strategies import Explore


def main() -> None:
    reasoner = Reasoner.from_pretrained("nano", max_batch=9)  # one slot for each draft, and one
    question = "State the final answer to the following arithmetic problem: 7826 - 4265 + 7203 ="
    for choose in ("best", "majority", "vote"):
        strategy = Explore(drafts=8, choose=choose, enough=None, temperature=1.0)
        result = reasoner.generate(question, strategy=strategy, seed=1)
        print(f"{choose}: {result.answer}, after {result.usage.drafted} drafted tokens")
        for draft in sorted(result.candidates, key=lambda c: -(c.score or 0)):
            score = "" if draft.score is None else f"{draft.score:.1e}"
            print(f"  {'*' if draft.chosen else ' '} {draft.answer} {score}")


if __name__ == "__main__":
    main()
