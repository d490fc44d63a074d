"""A strategy of one's own: the small slice writes, and where it hesitates the large one does."""

from cascade import Reasoner
from cascade.sequence import Sequence


def hesitant(seq: Sequence, prompt: list[int], ends: frozenset[int], sure: float = 0.9) -> None:
    """Write behind a prompt. `sure` is the probability below which a small token is dropped."""
    seq.append(prompt, "large")
    while seq.room and seq.tokens[-1] not in ends:
        seq.draft(1, "small")
        if seq.rows[0].softmax(0).max() < sure:
            seq.commit(0)
            seq.draft(1, "large")
        seq.commit(1)


def main() -> None:
    reasoner = Reasoner.from_pretrained("nano")
    codec = reasoner.codec
    _, prompt = codec.encode_prompt("57 + 87 + 70 - 12")
    with reasoner.model.sequence(consistency="shared") as seq:
        hesitant(seq, prompt, codec.end_ids)
        print(codec.decode(seq.tokens[len(prompt) :]))
        print(f"{seq.provenance[len(prompt) :].count('small')} tokens by small")


if __name__ == "__main__":
    main()
