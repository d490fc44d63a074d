"""Gate: when a step goes unverified, and for how many steps in a row."""

from cascade.policies import Always, Gate, Progress, Rewrite, Threshold
from tests.policies.steps import draft, known, step


def test_a_sure_draft_skips_verification() -> None:
    gate = Gate(probability=0.9)
    assert gate.skips(draft(known(0.95), known(0.91)))
    assert not gate.skips(draft(known(0.99), known(0.89)))


def test_only_so_many_steps_in_a_row_go_unverified() -> None:
    gate = Gate(at_most=2)
    sure = [draft(-0.001, progress=Progress(unverified=n)) for n in range(4)]
    assert [gate.skips(one) for one in sure] == [True, True, False, False]


def test_what_is_verified_is_decided_by_the_policy_inside() -> None:
    assert Gate(policy=Always(decision=Rewrite())).decide(step(-0.1)) == Rewrite()


def test_it_needs_the_drafts_figures_and_those_of_the_policy_inside() -> None:
    gate = Gate(policy=Threshold(score="judge"))
    assert gate.needs == {"draft", "judge"}
