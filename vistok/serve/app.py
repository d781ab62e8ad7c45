"""The HTTP side of the server: routes, errors as the OpenAI API writes them, streams, and clients that go away.

    app = create_app(Settings(models=("vistok-tiny",)), Access(api_keys=(key,)))

A request is judged in the order of what it costs: its header (``Guard``), its body as it comes in, its JSON, its
fields, its pictures. All of that, the time in the queue and the answer share one deadline.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from vistok.serve.access import Access, Guard
from vistok.serve.batching import BatcherClosed, DeadlineExceeded, End, Job, QueueFull
from vistok.serve.body import read_json
from vistok.serve.budget import Budget, Share
from vistok.serve.errors import RequestError
from vistok.serve.limits import Limits
from vistok.serve.metrics import DENSE, Metrics
from vistok.serve.runner import Ask, Finish
from vistok.serve.schema import (
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    Choice,
    ChunkChoice,
    Delta,
    ErrorAnswer,
    Model,
    ModelList,
    Usage,
    read_request,
)
from vistok.serve.service import Served, Service, Settings

_LOG = logging.getLogger(__name__)
_CLOSED = 499  # nobody reads it: the status of requests whose client went away, for the log and the metrics
_ERRORS = {
    400: "The request is not a proper one; `param` names the field.",
    401: "A key is needed.",
    403: "The picture may not be read.",
    404: "The model is not served.",
    413: "The request or a picture is too large.",
    415: "The body is not application/json.",
    421: "The server does not answer by that name.",
    431: "The header is too long.",
    429: "The queue is full; `Retry-After` says in how many seconds to try again.",
    500: "The server's fault.",
    502: "The picture's host did not give it.",
    503: "Not ready, busy, or shutting down.",
    504: "Not done in time.",
}


def create_app(
    settings: Settings, access: Access | None = None, *, grace_s: float = 30.0, wait: bool = False
) -> FastAPI:
    """The server as an ASGI application; ``app.state.service`` holds its models.

    Models are loaded when it starts, and ``/readyz`` says when they are there; with ``wait`` it has not started before.
    At its end requests that were taken are finished for ``grace_s`` seconds.
    """
    metrics = Metrics()
    service = Service(settings, metrics)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(service.start())
        loading.add_done_callback(_report_failure)
        try:
            if wait:
                await loading
            yield
        finally:
            loading.cancel()
            await asyncio.wait({loading})
            await service.close(grace_s)

    # The pages of documentation that FastAPI offers load scripts from elsewhere.
    app = FastAPI(title="vistok", lifespan=life, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service, app.state.metrics, app.state.budget = service, metrics, Budget(settings.limits.held_bytes)
    app.add_exception_handler(RequestError, _as_answer)
    app.add_exception_handler(HTTPException, _as_answer)
    app.add_exception_handler(Exception, _as_answer)
    _add_routes(app, service, metrics)
    access = access or Access()
    app.add_middleware(Guard, access=access, header_bytes=settings.limits.header_bytes)
    if access.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(access.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


def _report_failure(loading: asyncio.Task[None]) -> None:
    if not loading.cancelled() and (error := loading.exception()):
        _LOG.error("the models cannot be loaded", exc_info=error)


def _add_routes(app: FastAPI, service: Service, metrics: Metrics) -> None:
    since = int(time.time())

    @app.get("/healthz", tags=["server"])
    async def healthz() -> dict[str, str]:
        """That the server is alive."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["server"], responses=_documented(503))
    async def readyz() -> dict[str, str]:
        """Whether it can be asked."""
        if not service.ready:
            raise RequestError(503, "not_ready", "The models are not loaded.")
        return {"status": "ready"}

    @app.get("/metrics", tags=["server"], response_class=PlainTextResponse, responses=_documented(401, 421))
    async def figures() -> Response:
        """What the server counted, for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def described(name: str) -> Model:
        return Model(id=name, created=since, owned_by="vistok")

    @app.get("/v1/models", tags=["openai"], responses=_documented(401, 421))
    async def models() -> ModelList:
        """The models that are served."""
        return ModelList(data=[described(name) for name in service.settings.names])

    @app.get("/v1/models/{name:path}", tags=["openai"], responses=_documented(401, 404, 421))
    async def model(name: str) -> Model:
        """One of them."""
        if name not in service.settings.names:
            raise RequestError(404, "model_not_found", "model: is not served here.", "model")
        return described(name)

    schema = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    schema["properties"]["model"]["enum"] = list(service.settings.names)
    streamed: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

    @app.post(
        "/v1/chat/completions",
        tags=["openai"],
        response_model=ChatCompletion,
        responses=_documented(*_ERRORS) | streamed,
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}},
    )
    async def chat(request: Request) -> Response:
        """An answer to a conversation with pictures; with ``stream`` as server-sent events."""
        arrived, deadline = time.monotonic(), service.settings.limits.deadline_seconds
        budget: Budget = request.app.state.budget
        try:
            # What the body takes is given back when the answer begins, what the pictures take when it ends.
            async with AsyncExitStack() as stack:
                held = stack.enter_context(budget.share())
                try:
                    with budget.share() as reading:
                        async with asyncio.timeout(deadline):
                            asked = await _read(request, service.settings.limits, reading)
                            served, ask = await service.ask(asked, held)
                except TimeoutError as error:
                    raise DeadlineExceeded from error
                form = _Form.of(asked)
                return Answering(served, ask, form, arrived, arrived + deadline, metrics, stack.pop_all())
        except Exception as error:
            refusal = _refusal(error)
            metrics.requests.labels(refusal.status).inc()
            raise refusal from error

    # FastAPI does not see the models of a body that it does not read itself.
    app.openapi()["components"]["schemas"].update(schema.pop("$defs"))


def _documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorAnswer, "description": _ERRORS[status]} for status in statuses}


# A request -----------------------------------------------------------------------------------------------------------


async def _read(request: Request, limits: Limits, share: Share) -> ChatRequest:
    """The request in the body, whose bytes count in ``share``. Raises RequestError."""
    # Also what keeps other pages of the web out: a browser sends this type only after the server allowed it (CORS).
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(415, "unsupported_media_type", "The request must be of type application/json.")
    too_large = RequestError(413, "request_too_large", f"The request has more than {limits.request_bytes} bytes.")
    length = request.headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and int(length) > limits.request_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        if len(body) + len(chunk) > limits.request_bytes:
            raise too_large
        share.take(len(chunk))
        body += chunk
    return await asyncio.to_thread(lambda: read_request(read_json(bytes(body), limits), limits))


@dataclass(frozen=True)
class _Form:
    """How an answer is to be written. What else is in a request, its pictures above all, is not held any longer."""

    stream: bool
    with_usage: bool

    @classmethod
    def of(cls, request: ChatRequest) -> _Form:
        options = request.stream_options
        return cls(bool(request.stream), options is not None and options.include_usage)


class Answering(Response):
    """Runs a job and sends what it says, as one answer or as a stream; ends it when the client goes away.

    All of it happens while the response is sent, so that whatever ends it also ends the job and gives back what the
    request held.
    """

    def __init__(
        self,
        served: Served,
        ask: Ask,
        form: _Form,
        arrived: float,
        until: float,
        metrics: Metrics,
        held: AsyncExitStack,
    ) -> None:
        super().__init__()
        self._served, self._ask, self._form, self._held = served, ask, form, held
        self._arrived, self._until, self._metrics = arrived, until, metrics
        self._id, self._created = f"chatcmpl-{uuid4().hex}", int(time.time())
        self._status: int | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._status = message["status"]
            await send(message)

        async with self._held:
            work = asyncio.create_task(self._answer(scope, receive, sent))
            gone = asyncio.create_task(_gone(receive))
            try:
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            finally:  # also when the server itself gives the request up
                finished = work.done()
                for task in (work, gone):
                    task.cancel()
                await asyncio.wait({work, gone})
                self._metrics.requests.labels(self._status if finished and self._status else _CLOSED).inc()
        if finished:
            work.result()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            left = self._until - time.monotonic()
            if left <= 0:
                raise DeadlineExceeded
            async with self._served.batcher.submit(self._ask, self._ask.key, left) as job:
                await (self._stream if self._form.stream else self._whole)(job, scope, receive, send)
        except Exception as error:
            refusal = _refusal(error)
            if self._status is None:
                await JSONResponse(refusal.body(), refusal.status, refusal.headers)(scope, receive, send)
                return
            # The status is out already: what is left to say it with is an event, and no [DONE] after it.
            await send(_more(_event(refusal.body())))
            await send(_more(b"", last=True))

    async def _whole(self, job: Job[Ask], scope: Scope, receive: Receive, send: Send) -> None:
        said: list[str] = []
        first = None
        async for event in job:
            first = first or time.monotonic()
            if isinstance(event, End):
                answer = ChatCompletion(
                    id=self._id,
                    created=self._created,
                    model=self._served.name,
                    choices=[Choice(message=AnswerMessage(content="".join(said)), finish_reason=event.result.reason)],
                    usage=_usage(event.result),
                )
                self._count(event.result, first)
                await JSONResponse(answer.model_dump())(scope, receive, send)
            else:
                said.append(event.text)

    async def _stream(self, job: Job[Ask], scope: Scope, receive: Receive, send: Send) -> None:
        first = None
        async for event in job:
            if first is None:  # what is refused before the first token still gets its own status
                first = time.monotonic()
                headers = [
                    (b"content-type", b"text/event-stream; charset=utf-8"),
                    (b"cache-control", b"no-cache"),
                    (b"x-accel-buffering", b"no"),  # a proxy in between must not wait for the whole
                ]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send(_more(self._chunk(Delta(role="assistant", content=""))))
            if not isinstance(event, End):
                await send(_more(self._chunk(Delta(content=event.text))))
                continue
            self._count(event.result, first)
            last = self._chunk(Delta(), event.result)
            await send(_more(last + b"data: [DONE]\n\n", last=True))

    def _chunk(self, delta: Delta, finish: Finish | None = None) -> bytes:
        """An event that adds ``delta``; at the end also one with the usage, where the request asks for it."""
        about: dict[str, Any] = {"id": self._id, "created": self._created, "model": self._served.name}
        choice = ChunkChoice(delta=delta, finish_reason=None if finish is None else finish.reason)
        event = _event(_chunked(ChatCompletionChunk(**about, choices=[choice]), self._form.with_usage))
        if finish is None or not self._form.with_usage:
            return event
        return event + _event(_chunked(ChatCompletionChunk(**about, choices=[], usage=_usage(finish)), True))

    def _count(self, finish: Finish, first: float) -> None:
        now = time.monotonic()
        method = self._ask.method or DENSE
        self._metrics.finished(self._served.name, method, finish, first - self._arrived, now - self._arrived)


async def _gone(receive: Receive) -> None:
    """Comes back when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _usage(finish: Finish) -> Usage:
    prompt = finish.prompt_tokens - finish.visual_tokens + finish.visual_tokens_kept
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=finish.completion_tokens,
        total_tokens=prompt + finish.completion_tokens,
        visual_tokens=finish.visual_tokens,
        visual_tokens_kept=finish.visual_tokens_kept,
    )


def _chunked(chunk: ChatCompletionChunk, with_usage: bool) -> dict[str, Any]:
    """A chunk as the OpenAI API writes it: a delta names only what it adds, ``usage`` stands only where asked for."""
    value = chunk.model_dump(exclude=None if with_usage else {"usage"})
    for choice in value["choices"]:
        choice["delta"] = {name: part for name, part in choice["delta"].items() if part is not None}
    return value


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _more(body: bytes, last: bool = False) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": not last}


# Errors --------------------------------------------------------------------------------------------------------------


def _refusal(error: BaseException) -> RequestError:
    """What a client is told of ``error``; of what is the server's own fault nothing but that."""
    match error:
        case RequestError():
            return error
        case HTTPException():
            code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
            return RequestError(error.status_code, code, str(error.detail))
        case QueueFull(retry_after_s=seconds):
            return RequestError(429, "queue_full", "Too many requests wait.", retry_after_s=seconds)
        case DeadlineExceeded():
            return RequestError(504, "deadline_exceeded", "The request was not done in time.")
        case BatcherClosed():
            return RequestError(503, "shutting_down", "The server is shutting down.", retry_after_s=5)
        case ClientDisconnect():
            return RequestError(_CLOSED, "client_closed_request", "The client went away.")
    _LOG.error("a request failed", exc_info=error)
    return RequestError(500, "internal_error", "The server failed on this request.")


async def _as_answer(request: Request, error: Exception) -> Response:
    refusal = _refusal(error)
    more = getattr(error, "headers", None) or {}  # which methods are allowed, for one
    # Of a body that is not wanted no more is read: without this the rest of it would be, and thrown away.
    end = {"Connection": "close"} if request.method == "POST" else {}
    return JSONResponse(refusal.body(), refusal.status, {**more, **refusal.headers, **end})
