"""One log record a request, and a span where OpenTelemetry is installed.

The logger is `cascade`; nothing is printed unless logging is set up. Spans go to whatever tracer
provider the process has; they hold counts and times, never text.
"""

from __future__ import annotations

import logging
import time
from functools import cache
from typing import Any

from cascade.results import Result

logger = logging.getLogger("cascade")


def record(result: Result, strategy: str) -> None:
    """Report a request that has just ended."""
    usage, metrics = result.usage, result.metrics
    attributes: dict[str, Any] = {
        "cascade.strategy": strategy,
        "cascade.finish_reason": result.finish_reason,
        "cascade.tokens.prompt": usage.prompt,
        "cascade.tokens.reasoning": usage.reasoning,
        "cascade.tokens.answer": usage.answer,
        "cascade.tokens.drafted": usage.drafted,
        "cascade.tokens.accepted": usage.accepted,
        "cascade.tokens.rewritten": usage.rewritten,
        "cascade.steps": len(result.steps),
    }
    attributes |= {f"cascade.passes.{name}": count for name, count in metrics.passes.items()}
    level = logging.WARNING if result.error else logging.INFO
    logger.log(
        level,
        "%s: %s after %d tokens in %.2f s, by slice %s%s",
        strategy,
        result.finish_reason,
        usage.completion,
        metrics.seconds,
        dict(usage.by_slice),
        f": {result.error}" if result.error else "",
    )
    tracer = _tracer()
    if tracer is None:
        return
    end = time.time_ns()
    span = tracer.start_span(
        "cascade.request", start_time=end - int(metrics.seconds * 1e9), attributes=attributes
    )
    if result.error:
        from opentelemetry.trace import StatusCode

        span.set_status(StatusCode.ERROR, result.error)
    span.end(end)


@cache
def _tracer() -> Any:
    try:
        from opentelemetry import trace
    except ImportError:
        return None
    return trace.get_tracer("cascade")
