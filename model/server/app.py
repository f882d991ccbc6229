"""The routes: OpenAI's completions and chat completions, models, health and metrics.

    app = create_app(EngineWorker(engine), tokenizer, config.vocab_size, Settings("name", limits))

A call waits for its requests while it watches the connection: a client that leaves, or a call that
takes too long, cancels them.
"""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.server.answers import Answer
from model.server.metrics import Metrics
from model.server.protocol import ApiError, Call, Limits, Parser
from model.server.worker import EngineWorker, Event, QueueFull, Ticket, Unavailable
from model.tokenizer import Tokenizer

PATHS = {"/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics"}
KEEP_ALIVE_SECONDS = 10  # a comment in a stream without text, for proxies that close idle ones


@dataclass(frozen=True)
class Settings:
    """model: the name that requests give.  api_key: required of /v1 if not None."""

    model: str
    limits: Limits
    api_key: str | None = None


def create_app(
    worker: EngineWorker, tokenizer: Tokenizer, vocabulary: int, settings: Settings
) -> Starlette:
    """The application.  Its lifespan starts and stops the worker."""
    routes = Routes(worker, tokenizer, vocabulary, settings)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        await worker.stop()

    app = Starlette(
        routes=[
            Route("/v1/completions", routes.completions, methods=["POST"]),
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/v1/models", routes.models, methods=["GET"]),
            Route("/v1/models/{name:path}", routes.model, methods=["GET"]),
            Route("/health", routes.health, methods=["GET"]),
            Route("/metrics", routes.metrics, methods=["GET"]),
        ],
        exception_handlers={
            ApiError: on_api_error,
            HTTPException: on_http_error,
            Exception: on_failure,
        },
        lifespan=lifespan,
    )
    app.add_middleware(Guard, settings=settings, metrics=routes.counts)
    return app


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


async def on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Unknown routes and methods."""
    assert isinstance(error, HTTPException)
    text = f"{request.method} {request.url.path}: {error.detail}"
    return error_response(ApiError(error.status_code, text, headers=dict(error.headers or {})))


async def on_failure(_: Request, error: Exception) -> Response:
    return error_response(ApiError(500, "internal error"))


class Guard:
    """Checks the key and counts responses."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope["path"] if scope["path"] in PATHS else "other"
                self.metrics.responses[route, message["status"]] += 1
            await send(message)

        app = self.app if self.allowed(scope) else error_response(unauthorized())
        await app(scope, receive, counted)

    def allowed(self, scope: Scope) -> bool:
        key = self.settings.api_key
        if key is None or not scope["path"].startswith("/v1"):
            return True
        scheme, _, given = Request(scope).headers.get("authorization", "").partition(" ")
        # Starlette decodes headers as Latin-1.
        same = hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
        return scheme.lower() == "bearer" and same


def unauthorized() -> ApiError:
    text = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
    return ApiError(401, text, None, "invalid_api_key", {"www-authenticate": "Bearer"})


def busy() -> ApiError:
    return ApiError(429, "too many requests wait", None, "queue_full", {"retry-after": "1"})


def closed() -> ApiError:
    text = "the server shuts down, or its engine failed"
    return ApiError(503, text, None, "unavailable", {"retry-after": "5"})


def too_late(limits: Limits) -> ApiError:
    return ApiError(504, f"the answer took more than {limits.seconds:g} s", None, "timeout")


def failed() -> ApiError:
    return ApiError(500, "the engine failed", None, "engine_failed")


class Routes:
    """The handlers."""

    def __init__(
        self, worker: EngineWorker, tokenizer: Tokenizer, vocabulary: int, settings: Settings
    ) -> None:
        self.worker, self.tokenizer, self.settings = worker, tokenizer, settings
        self.limits, self.counts = settings.limits, Metrics()
        self.parser = Parser(settings.model, tokenizer, vocabulary, self.limits)
        self.created = int(time.time())

    async def completions(self, request: Request) -> Response:
        return await self.answer(request, self.parser.completion)

    async def chat(self, request: Request) -> Response:
        return await self.answer(request, self.parser.chat)

    async def answer(self, request: Request, parse: Callable[[bytes], Call]) -> Response:
        if self.worker.draining or self.worker.failure is not None:
            raise closed()
        body = await read_body(request, self.limits)
        # Templates and long prompts take time; the event loop serves the other clients meanwhile.
        call = await anyio.to_thread.run_sync(parse, body)
        answer = Answer(call, self.settings.model, self.tokenizer)
        try:
            with anyio.fail_after(self.limits.seconds):
                ticket = await self.worker.submit(call.items())
        except TimeoutError:
            raise too_late(self.limits) from None
        except QueueFull:
            raise busy() from None
        except Unavailable:
            raise closed() from None
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        return Reply(self, answer, ticket)

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.description()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.settings.model:
            raise ApiError(404, f"model {name!r} does not exist", "model", "model_not_found")
        return JSONResponse(self.description())

    def description(self) -> dict[str, Any]:
        return {
            "id": self.settings.model,
            "object": "model",
            "created": self.created,
            "owned_by": "deepkern",
            "max_model_len": self.limits.context,
        }

    async def health(self, _: Request) -> Response:
        """200 while requests are accepted, 503 otherwise."""
        status = "ok"
        if self.worker.draining:
            status = "shutting down"
        if self.worker.failure is not None or not self.worker.thread.is_alive():
            status = "engine failed"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def metrics(self, _: Request) -> Response:
        kind = "text/plain; version=0.0.4"
        return PlainTextResponse(self.counts.text(self.worker), media_type=kind)


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a request: JSON by its type, of a limited size, within a limited time."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a web page may send other types to this server unseen
        raise ApiError(415, f"content-type: got {kind!r}, expected application/json")
    body = bytearray()
    too_large = ApiError(413, f"the body has more than {limits.body_bytes} bytes")
    if int(request.headers.get("content-length", 0)) > limits.body_bytes:
        raise too_large
    try:
        with anyio.fail_after(limits.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body took more than {limits.body_seconds:g} s") from None
    except ClientDisconnect:
        raise ApiError(400, "the client left before the end of the body") from None
    return bytes(body)


class Reply(Response):
    """Waits for the events of a ticket and sends the answer, whole or as server-sent events."""

    def __init__(self, routes: Routes, answer: Answer, ticket: Ticket) -> None:
        self.routes, self.answer, self.ticket = routes, answer, ticket
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        send_answer = self.send_stream if self.answer.call.stream else self.send_whole
        try:
            async with anyio.create_task_group() as group:

                async def leave() -> None:
                    while (await receive())["type"] != "http.disconnect":
                        pass
                    group.cancel_scope.cancel()

                group.start_soon(leave)
                # A client that does not read its answer blocks `send` until then.
                group.cancel_scope.deadline = anyio.current_time() + 2 * self.routes.limits.seconds
                await send_answer(scope, receive, send)
                group.cancel_scope.cancel()
        finally:
            self.routes.worker.cancel(self.ticket)
            self.routes.counts.duration.observe(time.monotonic() - self.ticket.created)

    async def events(self) -> AsyncIterator[Event | None]:
        """The events; None where none arrived for some seconds.  Raises ApiError."""
        deadline, first = self.ticket.created + self.routes.limits.seconds, True
        while True:
            late = True
            with anyio.move_on_after(min(KEEP_ALIVE_SECONDS, deadline - time.monotonic())):
                event, late = await self.ticket.next(), False
            if late:
                if time.monotonic() >= deadline:
                    raise too_late(self.routes.limits)
                yield None
                continue
            if event is None:
                return
            if event.finish_reason in ("cancelled", "error"):
                raise failed() if event.finish_reason == "error" else closed()
            if first and event.tokens:
                wait = time.monotonic() - self.ticket.created
                self.routes.counts.first_token.observe(wait)
                first = False
            yield event

    async def send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async for event in self.events():
                if event is not None:
                    self.answer.add(event)
            response = JSONResponse(self.answer.whole())
        except ApiError as error:
            response = error_response(error)
        await response(scope, receive, send)

    async def send_stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def write(data: str, more: bool = True) -> None:
            body = data.encode()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        try:
            await write("".join(map(sse, self.answer.start())))
            async for event in self.events():
                pieces = (
                    [": keep-alive\n\n"] if event is None else map(sse, self.answer.streamed(event))
                )
                if text := "".join(pieces):
                    await write(text)
            await write("".join(map(sse, self.answer.end())) + "data: [DONE]\n\n", more=False)
        except ApiError as error:
            await write(sse(error.body()), more=False)


def sse(value: dict[str, Any]) -> str:
    """One server-sent event."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"data: {text}\n\n"
