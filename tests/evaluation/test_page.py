"""The report in a real browser: what a person sees, clicks and types, on a desk and on a phone."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cascade.evaluation import Evaluation
from cascade.evaluation.manifest import problems_digest
from cascade.evaluation.records import Record
from cascade.problems import Problem
from tests.browser import Browser, find
from tests.evaluation.records import manifest, record, step

pytestmark = pytest.mark.slow

SIZE = 1000
STRANGE = '</script><img src=x onerror="document.title=1">&amp;\u2028 <b>bold</b> ∑🙂'


def traced(id: str, run: str, rng: random.Random, by: str) -> Record:
    """A record of some steps; `stepwise` drops a draft now and then."""
    steps = []
    for i in range(rng.randint(2, 9)):
        if run == "stepwise" and rng.random() < 0.1:
            steps.append(
                step(i, text="12 + 30 = 42\n", slice="large", decision="rewrite", score=1e-5,
                     drafted_tokens=10, tokens=13, retracted="52\n", drafted_characters=10)
            )  # fmt: skip
        else:
            score, drafted = rng.random() if by == "small" else None, 10 * (run == "stepwise")
            steps.append(step(i, slice=by, drafter=by, score=score, drafted_tokens=drafted))
    steps.append(step(len(steps), text="42", phase="answer", slice=by, drafter=by))
    right = rng.random() < (0.9 if by == "large" else 0.7)
    return record(id, run, steps=tuple(steps), score=float(right), clock=rng.uniform(1, 60))


def made() -> Evaluation:
    """1,000 problems under three runs, with everything odd that there can be."""
    rng = random.Random(0)
    problems = [
        Problem(f"sum-{i}", f"What is {i} + {i}?", str(2 * i), kind="sum") for i in range(SIZE)
    ]
    problems[1] = Problem("odd", STRANGE, STRANGE, kind="odd")
    problems[2] = Problem("choice", "Which?", "B", kind="choice", choices=("bird", "fish"))
    records = [traced(p.id, "stepwise", rng, "small") for p in problems]
    records[1] = record("odd", answer=STRANGE, steps=(step(text=STRANGE, retracted=STRANGE),))
    records += [traced(p.id, "single", rng, "large") for p in problems]
    many = {"answer": "4", "text": "4", "score": 0.5, "chosen": True}
    records += [
        record(p.id, "explore", steps=(step(decision="brand new", drafted_tokens=0),),
               candidates=(many, many | {"chosen": False, "answer": None}))
        for p in problems[: SIZE // 2]
    ]  # fmt: skip
    records[SIZE] = record("sum-0", "single", error="PolicyError: it raised", finish="error",
                           score=0.0, answer=None, steps=(), usage={}, metrics={})  # fmt: skip
    facts = manifest(
        ["stepwise", "single", "explore"], size=SIZE, problems=problems_digest(problems)
    )
    return Evaluation(facts, [p.described for p in problems], records)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    find()  # skip before the work where there is no browser
    return made().report(tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    driven = Browser(tmp_path_factory.mktemp("profile"))
    yield driven
    driven.close()


def test_a_desk(browser: Browser, page: Path) -> None:
    began = time.monotonic()
    browser.open(page.as_uri(), width=1280, height=900)
    browser.wait_for("document.querySelectorAll('.steps > li').length > 1")
    assert time.monotonic() - began < 10
    rows = browser.run("[...document.querySelectorAll('#runs tbody tr')].map(r => r.innerText)")
    assert [row.split("\n")[0] for row in rows] == ["stepwise", "single", "explore"]
    assert "500 of 1,000" in browser.run("document.getElementById('runs-note').textContent")
    titles = browser.run("[...document.querySelectorAll('figure h3')].map(h => h.textContent)")
    assert titles == [
        "Accuracy against time", "Accuracy against cost", "Acceptance by step", "Calibration",
        "Tokens over time",
    ]  # fmt: skip
    browser.wait_for("document.querySelectorAll('figure svg').length >= 7")
    assert browser.run("document.querySelectorAll('#list li').length") == SIZE
    assert browser.run("document.querySelectorAll('#pairs tbody tr').length") == 3
    assert browser.run("document.documentElement.scrollWidth") == 1280
    assert browser.complaints == []


def test_the_keyboard_walks_through_problems_and_runs(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri(), width=1280, height=900)
    shown = "document.querySelector('#trace .dim').textContent"
    run = "document.querySelector('.tab[aria-selected=true]').textContent"
    browser.wait_for(f"document.querySelector('.steps') && {shown}.startsWith('sum-0')")
    for key, expected in (("j", "odd"), ("j", "choice"), ("k", "odd")):
        browser.press(key)
        browser.wait_for(f"{shown}.startsWith('{expected}')")
    for key, expected in (("l", "single"), ("l", "explore"), ("h", "single")):
        browser.press(key)
        browser.wait_for(f"{run} === '{expected}'")
    browser.press("/")
    for letter in "sum-998":
        browser.press(letter)
    browser.wait_for("document.querySelectorAll('#list li').length === 1")
    browser.press("Enter")
    browser.wait_for(f"{shown}.startsWith('sum-998')")
    assert browser.run("document.activeElement.id") == "list"
    browser.run("search.value = ''; refresh(); 0")
    browser.press("ArrowDown")
    browser.press("End")
    browser.wait_for(f"{shown}.startsWith('sum-999')")
    visible = browser.run(
        "(() => { const a = list.getBoundingClientRect(),"
        " b = list.querySelector('[aria-selected=true]').getBoundingClientRect();"
        " return b.top >= a.top - 1 && b.bottom <= a.bottom + 1; })()"
    )
    assert visible
    browser.press("f")
    browser.wait_for(
        "filter.value === 'wrong' && document.querySelectorAll('#list li').length < 500"
    )
    assert browser.run("document.querySelector('.verdict').textContent") == "wrong"
    assert browser.complaints == []


def test_a_dropped_draft_stands_beside_what_replaced_it(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri(), width=1280, height=900)
    browser.wait_for("document.querySelector('.steps')")
    browser.run("filter.value = 'retracted'; filter.dispatchEvent(new Event('change')); 0")
    browser.wait_for("document.querySelector('.swap s')")  # the strange one
    browser.press("j")
    browser.wait_for("document.querySelector('.swap s')?.textContent === '52'")
    assert browser.run("document.querySelector('.dropped .text').textContent") == "12 + 30 = 52"
    assert browser.run("document.querySelector('.replaced mark').textContent") == "42"
    left, right = browser.run(
        "[...document.querySelectorAll('.swap > div')].slice(0, 2)"
        ".map(d => d.getBoundingClientRect().y)"
    )
    assert left == right
    browser.click(".tab:nth-child(3)")
    browser.wait_for("document.querySelector('.candidates')?.textContent.includes('← chosen')")
    assert browser.run("document.querySelector('.decision').textContent") == "brand new"


def test_text_of_a_model_stays_text(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri(), width=1280, height=900)
    browser.wait_for("document.querySelector('.steps')")
    browser.press("j")
    browser.wait_for("document.querySelector('.question').textContent.includes('🙂')")
    assert browser.run("document.querySelector('.question').textContent") == STRANGE.strip()
    assert browser.run("document.querySelector('.replaced .text').textContent") == STRANGE
    assert browser.run("document.querySelectorAll('#trace img, #trace b img').length") == 0
    assert "cascade" in browser.run("document.title")
    browser.press("k")
    browser.press("l")
    browser.wait_for("document.querySelector('.error')?.textContent === 'PolicyError: it raised'")
    assert browser.complaints == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_phone(browser: Browser, page: Path, dark: bool) -> None:
    browser.open(page.as_uri(), width=390, height=844, dark=dark)
    browser.wait_for("document.querySelector('.steps')")
    browser.wait_for("document.querySelectorAll('figure svg').length >= 7")
    assert browser.run("document.documentElement.scrollWidth") == 390
    hidden = "getComputedStyle(document.querySelector('.trace-pane')).display === 'none'"
    assert browser.run(hidden)
    browser.click("#list li:nth-child(3)")
    browser.wait_for(f"!({hidden}) && document.querySelector('.question').textContent === 'Which?'")
    small = browser.run(
        "[...document.querySelectorAll('#trace *')].filter(e => e.scrollWidth > 390"
        " && !e.closest('.tabs')).map(e => e.className)"
    )
    assert small == []
    browser.click("#back")
    browser.wait_for(hidden)
    background, text = browser.run(
        "(({ backgroundColor, color }) => [backgroundColor, color])"
        "(getComputedStyle(document.body))"
    )
    assert (luminance(background) < luminance(text)) == dark
    assert contrast(background, text) > 7
    browser.click("#theme")
    other = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (luminance(other) < 0.5) != dark
    assert browser.complaints == []


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)` (WCAG 2)."""
    parts = [int(p) / 255 for p in colour[4:-1].split(",")[:3]]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_a_page_without_any_result_is_a_page(browser: Browser, tmp_path: Path) -> None:
    empty = Evaluation(manifest(), [Problem("p", "?", "1").described], [])
    browser.open(empty.report(tmp_path / "r.html").as_uri(), width=1280, height=900)
    assert "nano" in browser.run("document.querySelector('h1').textContent")
    assert browser.complaints == []


def test_the_page_needs_nothing_from_elsewhere(page: Path) -> None:
    text = page.read_text().replace("http://www.w3.org/2000/svg", "")
    for word in ("http://", "https://", '<link rel="stylesheet', "@import", "<script src", "<img"):
        assert word not in text, word
    assert "default-src 'none'" in text
