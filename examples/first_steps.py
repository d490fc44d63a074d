"""First steps: one question, its steps and who wrote them; a batch; a stream.

python examples/first_steps.py
"""

from cascade import Reasoner


def main() -> None:
    reasoner = Reasoner.from_pretrained("nano")  # or a directory, or a Hub id

    result = reasoner.generate("Find the Least Common Multiple (LCM) of these numbers: 75, 48")
    for step in result.steps:
        score = "" if step.score is None else f"p={step.score:.2f}"
        print(f"{step.slice:>6}  {(step.text or '').strip():28} {step.decision} {score}")
    print(f"answer {result.answer}, tokens by slice {dict(result.usage.by_slice)}\n")

    questions = ["57 + 87 + 70", "Calculate (3 + 4) * 6.", "Solve for x: 7*x = 91"]
    for question, result in zip(questions, reasoner.generate(questions), strict=True):
        print(f"{question} -> {result.answer}")

    print()
    for text in reasoner.stream_text("7826 - 4265 + 7203 - 7368"):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
