"""Integer expressions, evaluated in Python's order with floor division."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

Operate = Callable[[int, str, int], int]

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
    "%": operator.mod,
}

_PART = re.compile(r"\s*(\d+|[-+*/()])")


def apply(a: int, op: str, b: int) -> int:
    return OPERATIONS[op](a, b)


def evaluate(
    text: str, operate: Operate = apply, negate: Callable[[int], int] = operator.neg
) -> int:
    """Value of an expression; `operate` and `negate` are called in the order of evaluation.

    `negate` is called for a minus before a bracket; before a number it is the number's sign.
    Raises ValueError for what is no expression, ZeroDivisionError.
    """
    parts = _PART.findall(text)
    if len("".join(parts)) != len("".join(text.split())):
        raise ValueError(f"not an arithmetic expression: {text!r}")
    parts.reverse()  # the next part is the last one

    def factor() -> int:
        part = parts.pop()
        if part == "-":
            if parts[-1].isdigit():
                return -int(parts.pop())
            return negate(factor())
        if part == "(":
            value = total()
            parts.pop()
            return value
        return int(part)

    def product() -> int:
        value = factor()
        while parts and parts[-1] in "*/":
            value = operate(value, parts.pop(), factor())
        return value

    def total() -> int:
        value = product()
        while parts and parts[-1] in "+-":
            value = operate(value, parts.pop(), product())
        return value

    try:
        value = total()
    except (IndexError, ValueError):
        raise ValueError(f"not an arithmetic expression: {text!r}") from None
    if parts:
        raise ValueError(f"not an arithmetic expression: {text!r}")
    return value
