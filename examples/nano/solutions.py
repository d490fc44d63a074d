"""The chain of thought of a question: one step a line, then the answer."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .arithmetic import apply, evaluate
from .problems import BASE, CALCULATE, CHAIN, GCD, GCD_END, LCM, Step, to_base


@dataclass(slots=True)
class Trace:
    """Lines of thought, the answer, and the single operations behind them."""

    lines: list[str] = field(default_factory=list)
    answer: str = ""
    steps: list[Step] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The thought as the model writes it: every line ended by a newline."""
        return "".join(line + "\n" for line in self.lines)

    def operate(self, a: int, op: str, b: int) -> int:
        """Work out one operation, a line of its own; products of long numbers take several."""
        if op == "*":
            return self.multiply(a, b)
        self.steps.append((a, op, b))
        self.lines.append(f"{a} {op} {b} = {apply(a, op, b)}")
        return apply(a, op, b)

    def multiply(self, a: int, b: int) -> int:
        """At once by one digit, or two digits by two; else by the digits of the shorter factor."""
        long, short = sorted((abs(a), abs(b)), reverse=True)
        if short < 10 or long < 100:
            self.steps.append((a, "*", b))
        else:
            digits = str(short)
            places = range(len(digits) - 1, -1, -1)
            total = 0
            for part in (int(d) * 10**p for d, p in zip(digits, places, strict=True) if d != "0"):
                self.steps.append((long, "*", part))
                self.lines.append(f"{long} * {part} = {long * part}")
                total = self.operate(total, "+", long * part) if total else long * part
        self.lines.append(f"{a} * {b} = {a * b}")
        return a * b

    def negate(self, a: int) -> int:
        self.lines.append(f"-({a}) = {-a}")
        return -a

    def euclid(self, a: int, b: int) -> int:
        """The greatest common divisor by remainders."""
        while b:
            a, b = b, self.operate(a, "%", b)
        return a


def solve(question: str) -> Trace:
    """The chain of thought of a question.

    Raises ValueError for a question of no known kind, ZeroDivisionError.
    """
    trace = Trace()
    if question.startswith(CHAIN):
        _chain(question.removeprefix(CHAIN).removesuffix(" ="), trace)
    elif question.startswith(CALCULATE):
        _expression(question.removeprefix(CALCULATE).removesuffix("."), trace)
    elif question.startswith(GCD):
        a, b = map(int, question.removeprefix(GCD).removesuffix(GCD_END).split(", "))
        trace.answer = str(trace.euclid(a, b))
    elif question.startswith(LCM):
        a, b = map(int, question.removeprefix(LCM).split(", "))
        trace.answer = str(trace.multiply(trace.operate(a, "/", trace.euclid(a, b)), b))
    elif question.startswith(BASE):
        _base(question.removeprefix(BASE), trace)
    elif match := _EQUATION.search(question):
        _equation(match, trace)
    elif _BARE_SUM.fullmatch(question):
        _chain(question.removesuffix(" ="), trace)
    else:
        _expression(question.removesuffix(" ="), trace)
    return trace


_BARE_SUM = re.compile(r"\d+( [+-] \d+)+( =)?")
_EQUATION = re.compile(r": (?:(\d+) - )?(-?)(?:(\d+)\*)?[a-z](?: ([+-]) (\d+))? = (-?\d+)$")
_CONVERSION = re.compile(r"(\S+) number ([0-9a-f]*) to (\S+)\n")


def _chain(text: str, trace: Trace) -> None:
    """From the left: two operations a line while more than two are left, then one a line."""
    parts = text.split(" ")
    total = int(parts[0])
    rest = list(zip(parts[1::2], map(int, parts[2::2]), strict=True))
    while rest:
        taken = 2 if len(rest) > 2 else 1
        line = str(total)
        for op, number in rest[:taken]:
            trace.steps.append((total, op, number))
            total = apply(total, op, number)
            line += f" {op} {number}"
        trace.lines.append(f"{line} = {total}")
        del rest[:taken]
    trace.answer = str(total)


def _expression(text: str, trace: Trace) -> None:
    trace.answer = str(evaluate(text, trace.operate, trace.negate))


def _equation(match: re.Match[str], trace: Trace) -> None:
    """`a*x + b = c` or `b - a*x = c`: take b from both sides, then divide by a."""
    first, minus, coefficient, sign, last, right = match.groups()
    a = int(coefficient or 1) * (-1 if minus or first else 1)
    b = int(first or 0) or int(last or 0) * (-1 if sign == "-" else 1)
    value = int(right)
    if b:
        value = trace.operate(value, "-" if b > 0 else "+", abs(b))
    if a != 1:
        value = trace.operate(value, "/", a)
    trace.answer = str(value)


def _base(text: str, trace: Trace) -> None:
    """To decimal in one line, then one division a line."""
    match = _CONVERSION.fullmatch(text)
    if match is None:
        raise ValueError(f"not a base conversion: {text!r}")
    source, digits, target = _base_of(match[1]), match[2], _base_of(match[3])
    value = int(digits or "0", source)
    if source != 10:
        trace.lines.append(f"{digits} base {source} = {value}")
    if target == 10:
        trace.answer = str(value)
        return
    answer = ""
    while value >= target:
        quotient, rest = divmod(value, target)
        trace.steps.append((value, "/", target))
        trace.lines.append(f"{value} / {target} = {quotient} r {rest}")
        answer = (to_base(rest, target) or "0") + answer
        value = quotient
    trace.answer = (to_base(value, target) or "0") + answer


def _base_of(name: str) -> int:
    return {"binary": 2, "hexadecimal": 16}.get(name) or int(name.removeprefix("base-"))
