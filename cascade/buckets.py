"""Sizes that CUDA graphs are captured for: few of them, and none much larger than what is asked."""

from __future__ import annotations


def bucket_of_rows(rows: int) -> int:
    """Exact where few, then in steps of an eighth."""
    step = max(1, 2 ** ((rows - 1).bit_length() - 3)) if rows > 8 else 1
    return -(-rows // step) * step


def bucket_of_length(length: int) -> int:
    """Tokens a row: exact up to 9, then one more than a multiple of 8."""
    return length if length <= 9 else -(-(length - 1) // 8) * 8 + 1
