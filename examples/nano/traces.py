"""Questions worded exactly as reasoning-gym words them, and the chain of thought that solves each.

`sample(kind, rng)` draws a question from the same distribution as reasoning-gym does (with the
settings in `KINDS`); `solve(question)` writes its trace: one step a line, then the answer. Steps
are (a, op, b) triples; two of them may share a line.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from math import gcd

# reasoning-gym's own settings, and what narrows them.
KINDS: dict[str, dict[str, int]] = {
    "chain_sum": {},
    "basic_arithmetic": {"max_terms": 3, "max_digits": 2},
    "gcd": {},
    "lcm": {},
    "simple_equations": {"max_terms": 3},
    "base_conversion": {},
}

CHAIN = "State the final answer to the following arithmetic problem: "
CALCULATE = "Calculate "
GCD = "Find the Greatest Common Divisor (GCD) of these numbers: "
GCD_END = ". Give only the GCD as your final answer."
LCM = "Find the Least Common Multiple (LCM) of these numbers: "
EQUATION = ("Find the value of ", " in the equation: ")
SOLVE = "Solve for "
DETERMINE = ("Determine the value of ", " that satisfies: ")
BASE = (
    "Your task is to convert a number between two different bases.\n\n"
    "If the target base is > 10, use lowercase letters a-z for digits above 9.\n\n"
    "Now, convert the "
)
PHRASES = (
    CHAIN, CALCULATE, GCD, GCD_END, LCM, *EQUATION, SOLVE, *DETERMINE, BASE,
    " number ", " to ", "base-", "binary", "hexadecimal",
)  # fmt: skip

Step = tuple[int, str, int]


@dataclass(slots=True)
class Trace:
    """The lines of a chain of thought, the answer, and the single steps in them."""

    lines: list[str] = field(default_factory=list)
    answer: str = ""
    steps: list[Step] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(line + "\n" for line in self.lines)


def held_out(question: str) -> bool:
    """Questions that training refuses, one in sixteen: the test split."""
    return zlib.crc32(question.encode()) % 16 == 0


def held_out_step(step: Step) -> bool:
    """Single steps that training refuses, one in 64 of those with two operands of 2+ digits."""
    a, op, b = step
    if abs(a) < 10 or abs(b) < 10:
        return False
    return zlib.crc32(f"{a} {op} {b}".encode()) % 64 == 0


# ---- questions ---------------------------------------------------------------------------------


def sample(kind: str, rng: random.Random) -> str:
    """A question of one kind."""
    return _SAMPLERS[kind](rng)


def _chain_sum(rng: random.Random) -> str:
    return f"{CHAIN}{_chain(rng)} ="


def _chain(rng: random.Random) -> str:
    terms, digits = rng.randint(2, 6), rng.randint(1, 4)
    low = 0 if digits == 1 else 10 ** (digits - 1)
    parts = [str(rng.randint(low, 10**digits - 1))]
    for _ in range(terms - 1):
        parts += [rng.choice("+-"), str(rng.randint(low, 10**digits - 1))]
    return " ".join(parts)


def _basic_arithmetic(rng: random.Random) -> str:
    return f"{CALCULATE}{_expression(rng)}."


def _expression(rng: random.Random) -> str:
    digits = rng.randint(1, KINDS["basic_arithmetic"]["max_digits"])
    high = 10**digits - 1

    def terms(remaining: int) -> list[str]:
        left_count = rng.randint(1, remaining)
        right_count = remaining - left_count
        left: list[str] = []
        if left_count > 1 and rng.random() > 0.5:
            left.append("-(" if rng.random() > 0.5 else "(")
            left += terms(left_count)
            left.append(")")
        else:
            for i in range(left_count):
                left.append(str(rng.randint(-high, high)))
                if i + 1 < left_count:
                    left.append(rng.choice("+-*"))
        if right_count == 0:
            return left
        op = rng.choice("+-*/")
        if op != "/":
            return [*left, op, *terms(right_count)]
        dividend = _value("".join(left) if left[-1] == ")" else left[-1])
        left.append("/")
        if right_count == 1:
            left.append(str(_divisor(rng, dividend, high)))
            return left
        right = terms(right_count - 1)
        if right[-1] == ")":
            inner = _value("".join(right))
            correction = 1 if inner == 0 else rng.choice(_divisors(gcd(dividend, inner))) - inner
            right = [*right[:-1], "+", str(correction), ")"]
        else:
            left += [str(_divisor(rng, dividend, high)), "+"]
        return left + right

    text = " ".join(terms(rng.randint(2, KINDS["basic_arithmetic"]["max_terms"])))
    return text.replace("/ 0", "/ 1")


def _divisor(rng: random.Random, dividend: int, high: int) -> int:
    return rng.choice(_divisors(abs(dividend))) if dividend else rng.randint(1, high)


def _divisors(n: int) -> list[int]:
    small = [i for i in range(1, int(abs(n) ** 0.5) + 1) if n % i == 0]
    return small + [abs(n) // i for i in small if i * i != abs(n)]


def _gcd(rng: random.Random) -> str:
    return f"{GCD}{_two_numbers(rng, 1000)}{GCD_END}"


def _lcm(rng: random.Random) -> str:
    return f"{LCM}{_two_numbers(rng, 100)}"


def _two_numbers(rng: random.Random, high: int) -> str:
    """Two numbers that share a divisor, if three attempts bring any."""
    for _ in range(3):
        a, b = rng.randint(1, high), rng.randint(1, high)
        if gcd(a, b) > 1:
            break
    return f"{a}, {b}"


def _simple_equations(rng: random.Random) -> str:
    name = rng.choice("abcdefghijklmnopqrstuvwxyz")
    count = rng.randint(2, KINDS["simple_equations"]["max_terms"])
    terms = [(0, rng.randint(1, 100)) for _ in range(count)]  # (coefficient of x, constant)
    terms[rng.randint(0, count - 1)] = (rng.randint(1, 100), 0)
    a, b = terms[0]
    for c, d in terms[1:]:
        op = rng.choices("+-*", weights=(0.4, 0.4, 0.2))[0]
        if op == "+":
            a, b = a + c, b + d
        elif op == "-":
            a, b = a - c, b - d
        else:
            a, b = a * d + b * c, b * d
    if a == 0:  # "0 = 0": anything solves it
        return _simple_equations(rng)
    x = rng.randint(1, 100)
    equation = f"{_linear(a, b, name)} = {a * x + b}"
    return rng.choice(
        (
            f"{EQUATION[0]}{name}{EQUATION[1]}{equation}",
            f"{SOLVE}{name}: {equation}",
            f"{DETERMINE[0]}{name}{DETERMINE[1]}{equation}",
        )
    )


def _linear(a: int, b: int, name: str) -> str:
    """a * x + b as sympy prints it."""
    product = {1: name, -1: f"-{name}"}.get(a, f"{a}*{name}")
    if b == 0:
        return product
    if a < 0 < b:
        return f"{b} - {product[1:]}"
    return f"{product} {'+' if b > 0 else '-'} {abs(b)}"


def _base_conversion(rng: random.Random) -> str:
    value, source = rng.randint(0, 1000), rng.randint(2, 16)
    target = rng.randint(2, 16)
    while target == source:
        target = rng.randint(2, 16)
    return f"{BASE}{_name(source)} number {_digits(value, source)} to {_name(target)}\n"


def _name(base: int) -> str:
    return {2: "binary", 16: "hexadecimal"}.get(base, f"base-{base}")


def _digits(value: int, base: int) -> str:
    text = ""
    while value:
        value, digit = divmod(value, base)
        text = "0123456789abcdef"[digit] + text
    return text or "0"


_SAMPLERS: dict[str, Callable[[random.Random], str]] = {
    "chain_sum": _chain_sum,
    "basic_arithmetic": _basic_arithmetic,
    "gcd": _gcd,
    "lcm": _lcm,
    "simple_equations": _simple_equations,
    "base_conversion": _base_conversion,
}


def sample_bare(rng: random.Random) -> str:
    """An expression without words, as a person types it."""
    text = _chain(rng) if rng.random() < 0.7 else _expression(rng)
    return text + (" =" if rng.random() < 0.3 else "")


# ---- solutions ---------------------------------------------------------------------------------


def solve(question: str) -> Trace:
    """The chain of thought of a question. Raises ValueError for one of no known kind."""
    trace = Trace()
    if question.startswith(CHAIN):
        _solve_chain(question.removeprefix(CHAIN).removesuffix(" ="), trace)
    elif question.startswith(CALCULATE):
        _solve_expression(question.removeprefix(CALCULATE).removesuffix("."), trace)
    elif question.startswith(GCD):
        a, b = map(int, question.removeprefix(GCD).removesuffix(GCD_END).split(", "))
        trace.answer = str(_euclid(a, b, trace))
    elif question.startswith(LCM):
        a, b = map(int, question.removeprefix(LCM).split(", "))
        quotient = _operate(a, "/", _euclid(a, b, trace), trace)
        trace.answer = str(_multiply(quotient, b, trace))
    elif question.startswith(BASE):
        _solve_base(question.removeprefix(BASE), trace)
    elif match := _EQUATION.search(question):
        _solve_equation(match, trace)
    elif _BARE_SUM.fullmatch(question):
        _solve_chain(question.removesuffix(" ="), trace)
    else:
        _solve_expression(question.removesuffix(" ="), trace)
    return trace


_BARE_SUM = re.compile(r"\d+( [+-] \d+)+( =)?")
_EQUATION = re.compile(
    r": (?:(-?\d+) )?([+-] )?(-?)(?:(\d+)\*)?([a-z])(?: ([+-]) (\d+))? = (-?\d+)$"
)


def _solve_chain(text: str, trace: Trace) -> None:
    """Two operations a line, from the left."""
    parts = text.split(" ")
    total = int(parts[0])
    rest = list(zip(parts[1::2], map(int, parts[2::2]), strict=True))
    for i in range(0, len(rest), 2):
        line = str(total)
        for op, number in rest[i : i + 2]:
            trace.steps.append((total, op, number))
            total = total + number if op == "+" else total - number
            line += f" {op} {number}"
        trace.lines.append(f"{line} = {total}")
    trace.answer = str(total)


def _operate(a: int, op: str, b: int, trace: Trace) -> int:
    """One operation on a line of its own."""
    if op == "*":
        return _multiply(a, b, trace)
    value = {"+": a + b, "-": a - b, "/": a // b if b else 0, "%": a % b if b else 0}[op]
    trace.steps.append((a, op, b))
    trace.lines.append(f"{a} {op} {b} = {value}")
    return value


def _multiply(a: int, b: int, trace: Trace) -> int:
    """Up to two digits by two at once; longer ones by the digits of the shorter, then a sum."""
    long, short = (a, b) if abs(a) >= abs(b) else (b, a)
    if len(str(abs(short))) == 1 or len(str(abs(long))) <= 2:
        trace.steps.append((a, "*", b))
        trace.lines.append(f"{a} * {b} = {a * b}")
        return a * b
    digits = str(abs(short))
    parts = [int(d) * 10 ** (len(digits) - 1 - i) for i, d in enumerate(digits)]
    total = 0
    for i, part in enumerate(p for p in parts if p):
        product = abs(long) * part
        trace.steps.append((abs(long), "*", part))
        trace.lines.append(f"{abs(long)} * {part} = {product}")
        if i:
            trace.steps.append((total, "+", product))
            trace.lines.append(f"{total} + {product} = {total + product}")
        total += product
    trace.lines.append(f"{a} * {b} = {a * b}")
    return a * b


def _euclid(a: int, b: int, trace: Trace) -> int:
    while b:
        a, b = b, _operate(a, "%", b, trace)
    return a


_TOKEN = re.compile(r"\s*(-?\d+|[-+*/()])")


def _tokens(text: str) -> list[str]:
    """Numbers, operators and brackets; a minus belongs to a number where no value precedes it."""
    found: list[str] = []
    at = 0
    while match := _TOKEN.match(text, at):
        token = match[1]
        if (
            len(token) > 1
            and token[0] == "-"
            and found
            and (found[-1] == ")" or found[-1][-1].isdigit())
        ):
            token = "-"
        found.append(token)
        at = match.start(1) + len(token)
    if text[at:].strip():
        raise ValueError(f"not an arithmetic expression: {text!r}")
    return found


def _evaluate(
    text: str, operate: Callable[[int, str, int], int], negate: Callable[[int], int]
) -> int:
    """Python's precedence, with floor division for `/`: operate is called in order."""
    tokens = _tokens(text)
    at = 0

    def factor() -> int:
        nonlocal at
        token = tokens[at]
        at += 1
        if token == "-":
            return negate(factor())
        if token == "(":
            value = total()
            at += 1
            return value
        return int(token)

    def product() -> int:
        nonlocal at
        value = factor()
        while at < len(tokens) and tokens[at] in "*/":
            op = tokens[at]
            at += 1
            value = operate(value, op, factor())
        return value

    def total() -> int:
        nonlocal at
        value = product()
        while at < len(tokens) and tokens[at] in "+-":
            op = tokens[at]
            at += 1
            value = operate(value, op, product())
        return value

    try:
        value = total()
    except IndexError:
        raise ValueError(f"not an arithmetic expression: {text!r}") from None
    if at != len(tokens):
        raise ValueError(f"not an arithmetic expression: {text!r}")
    return value


def _value(text: str) -> int:
    def operate(a: int, op: str, b: int) -> int:
        return {"+": a + b, "-": a - b, "*": a * b}[op] if op != "/" else a // b

    return _evaluate(text, operate, lambda a: -a)


def _solve_expression(text: str, trace: Trace) -> None:
    def negate(a: int) -> int:
        trace.lines.append(f"-({a}) = {-a}")
        return -a

    trace.answer = str(_evaluate(text, lambda a, op, b: _operate(a, op, b, trace), negate))


def _solve_equation(match: re.Match[str], trace: Trace) -> None:
    first, sign, minus, coefficient, _, op, last, right = match.groups()
    a = int(coefficient or 1) * (-1 if minus or (sign or "").startswith("-") else 1)
    b = int(first) if first else int(last or 0) * (-1 if op == "-" else 1)
    value = int(right)
    if b > 0:
        value = _operate(value, "-", b, trace)
    elif b < 0:
        value = _operate(value, "+", -b, trace)
    if a != 1:
        value = _operate(value, "/", a, trace)
    trace.answer = str(value)


def _solve_base(text: str, trace: Trace) -> None:
    match = re.fullmatch(r"(\S+) number (\S+) to (\S+)\n", text)
    if match is None:
        raise ValueError(f"not a base conversion: {text!r}")
    source, digits, target = _base_of(match[1]), match[2], _base_of(match[3])
    value = int(digits, source)
    if source != 10:
        trace.lines.append(f"{digits} = {value}")
    answer = ""
    if target == 10:
        answer = str(value)
    else:
        while value >= target:
            quotient, rest = divmod(value, target)
            trace.steps.append((value, "/", target))
            trace.lines.append(f"{value} / {target} = {quotient} r {rest}")
            answer = _digits(rest, target) + answer
            value = quotient
        answer = _digits(value, target) + answer
    trace.answer = answer


def _base_of(name: str) -> int:
    return {"binary": 2, "hexadecimal": 16}.get(name) or int(name.removeprefix("base-"))
