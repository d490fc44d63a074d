"""A policy of one's own: long numbers are where a small slice slips, so they have to be surer.

    python examples/own_policy.py

A policy sees numbers and text, never a tensor; it can be stored, combined and calibrated.
"""

import re
from typing import Literal

from cascade import Reasoner
from cascade.policies import Accept, AnyDecision, Policy, Rewrite, StepScores, Threshold, value_of


class LongNumbers(Policy):
    """Keep a step whose least likely token passes; one with long numbers must pass `strict`."""

    kind: Literal["long_numbers"] = "long_numbers"
    digits: int = 4
    strict: float = 0.9
    lenient: float = 0.1

    def decide(self, scores: StepScores) -> AnyDecision:
        long = re.search(rf"\d{{{self.digits},}}", scores.text or "")
        if value_of("min", scores) >= (self.strict if long else self.lenient):
            return Accept()
        return Rewrite()  # the whole step anew, by the verifier


def main() -> None:
    reasoner = Reasoner.from_pretrained("nano")
    asked = "State the final answer to the following arithmetic problem: "
    question = asked + "7826 - 4265 + 7203 - 7368 ="
    for policy in (LongNumbers(), Threshold(probability=0.5)):
        result = reasoner.generate(question, policy=policy)
        decisions = [step.decision for step in result.steps]
        print(f"{policy.kind}: {result.answer}, steps {decisions}")


if __name__ == "__main__":
    main()
