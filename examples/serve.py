"""A Reasoner behind FastAPI, with streaming: an example, not a server product.

    pip install 'cascade-reasoning[serve]'
    python examples/serve.py --port 8000
    curl -N localhost:8000/reason -H 'content-type: application/json' \
         -d '{"question": "57 + 87 + 70"}'

Each line of the reply is one event: drafts as they are written, steps as they are committed or
retracted, and at the end the result. A client that goes away stops its work within one step.
Requests wait for each other: a Reasoner runs one call at a time.
"""

import argparse
import json
from collections.abc import AsyncIterator
from dataclasses import asdict

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from cascade import Reasoner, SamplingParams
from cascade.errors import RequestError


class Question(BaseModel):
    question: str
    params: SamplingParams = SamplingParams(max_tokens=512)


def create_app(reasoner: Reasoner) -> FastAPI:
    app = FastAPI(title="cascade")

    @app.post("/reason")
    async def reason(asked: Question) -> StreamingResponse:
        try:
            reasoner.check(asked.question, asked.params)
        except RequestError as error:
            raise HTTPException(422, str(error)) from None

        async def lines() -> AsyncIterator[str]:
            async for event in reasoner.astream(asked.question, asked.params):
                yield json.dumps(asdict(event)) + "\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    app = create_app(Reasoner.from_pretrained(args.model, max_batch=1))
    uvicorn.run(app, host=args.host, port=args.port)


if __name__ == "__main__":
    main()
