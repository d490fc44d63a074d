"""Questions worded exactly as reasoning-gym words them, and what training must not see of them.

`sample(kind, rng)` makes the same draws in the same order as reasoning-gym's generator, so equal
seeds give equal text (a test holds this); it needs neither reasoning-gym nor sympy.
"""

from __future__ import annotations

import random
import string
import zlib
from collections.abc import Callable
from math import gcd

from .arithmetic import evaluate

# Keyword arguments of `reasoning_gym.create_dataset`; all else is at its default.
KINDS: dict[str, dict[str, int]] = {
    "chain_sum": {},
    "basic_arithmetic": {"max_terms": 4, "max_digits": 2},
    "gcd": {},
    "lcm": {},
    "simple_equations": {},
    "base_conversion": {},
}

CHAIN = "State the final answer to the following arithmetic problem: "
CALCULATE = "Calculate "
GCD = "Find the Greatest Common Divisor (GCD) of these numbers: "
GCD_END = ". Give only the GCD as your final answer."
LCM = "Find the Least Common Multiple (LCM) of these numbers: "
FIND = ("Find the value of ", " in the equation: ")
SOLVE = "Solve for "
DETERMINE = ("Determine the value of ", " that satisfies: ")
BASE = (
    "Your task is to convert a number between two different bases.\n\n"
    "If the target base is > 10, use lowercase letters a-z for digits above 9.\n\n"
    "Now, convert the "
)
PHRASES = (
    CHAIN, CALCULATE, GCD, GCD_END, LCM, *FIND, SOLVE, *DETERMINE, BASE,
    " number ", " to ", "base-", "binary", "hexadecimal", " base ",
)  # fmt: skip

Step = tuple[int, str, int]
"""One operation: left operand, operator, right operand."""


def held_out(question: str) -> bool:
    """Questions that training refuses, one in 16: the test split."""
    return zlib.crc32(question.encode()) % 16 == 0


def held_out_step(step: Step) -> bool:
    """Operations that training refuses: one in 64 of those whose operands have 2 digits or more."""
    a, op, b = step
    if abs(a) < 10 or abs(b) < 10:
        return False
    return zlib.crc32(f"{a} {op} {b}".encode()) % 64 == 0


def sample(kind: str, rng: random.Random) -> str:
    """A question of one kind. Raises ZeroDivisionError where reasoning-gym's generator does."""
    return _SAMPLERS[kind](rng)


def sample_bare(rng: random.Random) -> str:
    """An expression without words, as a person types it."""
    text = _chain(rng) if rng.random() < 0.6 else _expression(rng)
    return text + (" =" if rng.random() < 0.4 else "")


def _chain_sum(rng: random.Random) -> str:
    return f"{CHAIN}{_chain(rng)} ="


def _chain(rng: random.Random) -> str:
    count, digits = rng.randint(2, 6), rng.randint(1, 4)
    low = 0 if digits == 1 else 10 ** (digits - 1)
    numbers = [rng.randint(low, 10**digits - 1) for _ in range(count)]
    operators = [rng.choice("+-") for _ in range(count - 1)]
    rest = (f" {op} {n}" for op, n in zip(operators, numbers[1:], strict=True))
    return str(numbers[0]) + "".join(rest)


def _basic_arithmetic(rng: random.Random) -> str:
    return f"{CALCULATE}{_expression(rng)}."


def _expression(rng: random.Random) -> str:
    settings = KINDS["basic_arithmetic"]
    count, digits = rng.randint(2, settings["max_terms"]), rng.randint(1, settings["max_digits"])
    text = " ".join(_terms(rng, count, 10**digits - 1)).replace("/ 0", "/ 1")
    evaluate(text)
    return text


def _terms(rng: random.Random, remaining: int, high: int) -> list[str]:
    """Parts of an expression of `remaining` numbers between -high and high."""
    left_count = rng.randint(1, remaining)
    right_count = remaining - left_count
    parts: list[str] = []
    if left_count > 1 and rng.random() > 0.5:
        parts.append("-(" if rng.random() > 0.5 else "(")
        parts += _terms(rng, left_count, high)
        parts.append(")")
    else:
        for i in range(left_count):
            parts.append(str(rng.randint(-high, high)))
            if i + 1 < left_count:
                parts.append(rng.choice("+-*"))
    if right_count == 0:
        return parts
    op = rng.choice("+-*/")
    if op != "/":
        return [*parts, op, *_terms(rng, right_count, high)]
    dividend = evaluate("".join(parts) if parts[-1] == ")" else parts[-1])
    parts.append("/")
    if right_count == 1:
        return [*parts, _divisor(rng, dividend, high)]
    right = _terms(rng, right_count - 1, high)
    if right[-1] == ")":
        inner = evaluate("".join(right))
        target = rng.choice(_divisors(gcd(dividend, inner))) if inner else inner + 1
        right = [*right[:-1], "+", str(target - inner), ")"]
    else:
        parts += [_divisor(rng, dividend, high), "+"]
    return parts + right


def _divisor(rng: random.Random, dividend: int, high: int) -> str:
    return str(rng.choice(_divisors(abs(dividend))) if dividend else rng.randint(1, high))


def _divisors(n: int) -> list[int]:
    found: list[int] = []
    for i in range(1, int(n**0.5) + 1):
        if n % i == 0:
            found += [i] if i * i == n else [i, n // i]
    return found


def _two_numbers(rng: random.Random, high: int) -> str:
    """Two numbers that share a divisor, if three attempts bring any."""
    for _ in range(3):
        a, b = (rng.randint(1, high) for _ in range(rng.randint(2, 2)))
        if gcd(a, b) > 1:
            break
    return f"{a}, {b}"


def _gcd(rng: random.Random) -> str:
    return f"{GCD}{_two_numbers(rng, 1000)}{GCD_END}"


def _lcm(rng: random.Random) -> str:
    return f"{LCM}{_two_numbers(rng, 100)}"


def _simple_equations(rng: random.Random) -> str:
    name = rng.choice(string.ascii_lowercase)
    count = rng.randint(2, 4)
    terms = [(0, rng.randint(1, 100)) for _ in range(count)]  # coefficient of the unknown, constant
    position = rng.randint(0, count - 1)
    terms[position] = (rng.randint(1, 100), 0)
    a, b = terms[0]
    for c, d in terms[1:]:
        op = rng.choices("+-*", weights=(0.4, 0.4, 0.2))[0]
        if op == "+":
            a, b = a + c, b + d
        elif op == "-":
            a, b = a - c, b - d
        else:
            a, b = a * d + b * c, b * d
    equation = f"{_linear(a, b, name)} = {a * rng.randint(1, 100) + b}"
    wordings = (
        f"{FIND[0]}{name}{FIND[1]}{equation}",
        f"{SOLVE}{name}: {equation}",
        f"{DETERMINE[0]}{name}{DETERMINE[1]}{equation}",
    )
    return rng.choice(wordings)


def _linear(a: int, b: int, name: str) -> str:
    """a * name + b as sympy prints it."""
    product = {1: name, -1: f"-{name}"}.get(a, f"{a}*{name}")
    if b == 0:
        return product
    if a < 0 < b:
        return f"{b} - {product[1:]}"
    return f"{product} {'+' if b > 0 else '-'} {abs(b)}"


def _base_conversion(rng: random.Random) -> str:
    value, source, target = rng.randint(0, 1000), rng.randint(2, 16), rng.randint(2, 16)
    while target == source:
        target = rng.randint(2, 16)
    digits = to_base(value, source) or ("0" if source in (2, 16) else "")
    return f"{BASE}{_base_name(source)} number {digits} to {_base_name(target)}\n"


def _base_name(base: int) -> str:
    return {2: "binary", 16: "hexadecimal"}.get(base, f"base-{base}")


def to_base(value: int, base: int) -> str:
    """Digits of value >= 0 in a base of up to 16; none for 0."""
    text = ""
    while value:
        value, digit = divmod(value, base)
        text = "0123456789abcdef"[digit] + text
    return text


_SAMPLERS: dict[str, Callable[[random.Random], str]] = {
    "chain_sum": _chain_sum,
    "basic_arithmetic": _basic_arithmetic,
    "gcd": _gcd,
    "lcm": _lcm,
    "simple_equations": _simple_equations,
    "base_conversion": _base_conversion,
}
