"""The example that trains nano: its data is reasoning-gym's, its network transformers', its files
load, and a stopped run goes on."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, NemotronHForCausalLM

from cascade import ElasticModel, problems

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import train_nano  # noqa: E402
from nano import checkpoint, documents, network, traces, vocabulary  # noqa: E402


@pytest.mark.parametrize("kind", list(traces.KINDS))
def test_traces_solve_what_reasoning_gym_asks(kind: str) -> None:
    for problem in problems.make(kind, 40, 12, **traces.KINDS[kind]):
        if problem.question.endswith(": 0 = 0"):  # anything solves it
            continue
        trace = traces.solve(problem.question)
        assert problem.score(trace.answer) == 1, problem.question
        assert all(len(line) < 60 for line in trace.lines)


@pytest.mark.parametrize("kind", list(traces.KINDS))
def test_own_questions_are_worded_and_solved_like_reasoning_gym_s(kind: str) -> None:
    theirs = {p.question.split()[0] for p in problems.make(kind, 60, 3, **traces.KINDS[kind])}
    rng = random.Random(5)
    for _ in range(40):
        question = traces.sample(kind, rng)
        assert question.split()[0] in theirs
        assert traces.solve(question).answer


def test_the_library_s_held_out_split_is_the_one_training_refuses() -> None:
    assert dict(problems.NANO_KINDS) == traces.KINDS
    rng = random.Random(1)
    for _ in range(300):
        question = traces.sample("chain_sum", rng)
        assert problems.held_out(question) == traces.held_out(question)


def test_no_document_is_held_out_and_its_reply_is_marked() -> None:
    rows = documents.pack(random.Random(2), rows=6, length=224)
    prompt_end = vocabulary.encode(f"{vocabulary.START}assistant\n{vocabulary.THINK}\n")
    for ids, number, reply in zip(rows.ids, rows.document, rows.reply, strict=True):
        for one in range(1, int(number.max()) + 1):
            tokens = ids[number == one].tolist()
            text = "".join(vocabulary.WORDS[i] for i in tokens)
            question = text.partition("user\n")[2].partition(vocabulary.END)[0]
            assert not traces.held_out(question)
            first = int(reply[number == one].argmax())
            assert tokens[first - len(prompt_end) : first] == prompt_end
            trace = traces.solve(question)
            assert text.endswith(f"{trace.text}</think>{trace.answer}{vocabulary.END}")
            assert not any(map(traces.held_out_step, trace.steps))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few seconds, and a second one that goes on from it."""
    out = tmp_path_factory.mktemp("nano")
    for seconds in (3, 8):  # of which a busy machine may take one or two a step
        command = [
            sys.executable, str(EXAMPLES / "train_nano.py"), "--preset", "tiny", "--device", "cpu",
            "--rows", "2", "--workers", "0", "--minutes", str(seconds / 60), "--out", str(out),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        if seconds == 8:
            assert "going on at step" in done.stdout
    return out


def test_training_writes_a_nested_checkpoint(tiny: Path) -> None:
    model = ElasticModel.from_pretrained(tiny)
    assert list(model.slices) == ["small", "medium", "large"]
    assert all(spec.trained for spec in model.slices.values())
    log = json.loads((tiny / "training_log.json").read_text())
    assert log["steps"] > 2 and log["seed"] == 2605 and "train_nano.py" in log["command"]


def test_the_training_network_is_transformers_own(tiny: Path) -> None:
    sizes = network.Sizes(
        pattern="ME*ME", hidden=64, ffn=32, shared=64, experts=4, heads=4, head_dim=16, state=16
    )
    model = network.Nano(sizes)
    checkpoint.read(model, tiny)
    reference = NemotronHForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    ids = torch.randint(8, 120, (1, 90))
    widths = (64, 32)
    with torch.no_grad():
        ours = network.pair_forward(model, ids, torch.ones_like(ids), (widths, widths), None)[0]
        theirs = reference(ids).logits
    assert torch.allclose(ours, theirs, atol=2e-3, rtol=2e-3)


def test_a_slice_of_the_pair_is_unmoved_by_the_other_unless_it_owns_tokens() -> None:
    sizes = network.Sizes(pattern="M*E", hidden=32, ffn=16, shared=32, experts=4)
    model = network.Nano(sizes, seed=3)
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)
    ids = torch.randint(8, 120, (1, 20))
    alone, small = (32, 16), (16, 8)
    document = torch.ones_like(ids)
    other = torch.zeros_like(ids, dtype=torch.bool)
    other[:, 5:9] = True
    with torch.no_grad():
        single = network.pair_forward(model, ids, document, (alone, alone), None)[0]
        apart = network.pair_forward(model, ids, document, (alone, small), None)[0]
        mixed = network.pair_forward(model, ids, document, (alone, small), (other, ~other))[0]
    assert torch.allclose(single, apart, atol=1e-6)
    assert torch.allclose(single[:, :5], mixed[:, :5], atol=1e-6)
    assert (single[:, 9:] - mixed[:, 9:]).abs().max() > 1e-4


def test_the_tokenizer_round_trips_and_its_template_is_the_training_format(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    text = "Calculate 12 * (3 - 4) = -12\n~^"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    question = "Calculate 3 + 4."
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    trace = traces.solve(question)
    tokens, prompt = vocabulary.encode_chat(question, trace.text, trace.answer)
    assert tokens[:prompt] == ids


@pytest.mark.gpu
def test_steps_replayed_from_graphs_are_steps() -> None:
    sizes, slices = train_nano.PRESETS["tiny"]
    losses = []
    for captured in (False, True):
        torch.manual_seed(1)
        trainer = train_nano.Trainer(network.Nano(sizes, 5).to("cuda"), slices, "cuda")
        source = documents.batches(7, 8, 224, 0)
        train_nano.warm_up(trainer, source)
        if captured:
            trainer.capture()
        source = documents.batches(7, 8, 224, 0)
        seen = []
        for i in range(40):
            trainer.update(next(source), i / 400)  # unmixed, so that nothing is drawn
            seen.append([float(trainer.losses[name]) for name in slices])
        losses.append(seen)
    assert torch.allclose(torch.tensor(losses[0][:5]), torch.tensor(losses[1][:5]), rtol=1e-2)
    assert torch.allclose(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=0.1)
    assert losses[1][-1][0] < losses[1][3][0]
