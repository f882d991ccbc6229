"""An HTTP server with OpenAI's API.

    python -m model.serve --checkpoint DIR --port 8000

    from openai import OpenAI
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "Hello"}])

Routes: /v1/completions, /v1/chat/completions, /v1/models, /health and /metrics (Prometheus).  The
name of the model is that of the directory.  SIGTERM and Ctrl-C refuse new requests, wait for the
others up to --shutdown-timeout, and end with exit code 0; a second Ctrl-C does not wait.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Annotated

import typer
import uvicorn
from starlette.applications import Starlette

from model.engine import Engine
from model.generate import (
    CHECKPOINT,
    CacheDtype,
    DraftTokens,
    Dtype,
    Folder,
    Fp8,
    exit_with,
    load_engine,
)
from model.server.app import Settings, create_app
from model.server.protocol import Limits
from model.server.worker import EngineWorker


class Server(uvicorn.Server):
    """uvicorn that lets requests end before it closes its connections."""

    def __init__(self, app: Starlette, worker: EngineWorker, timeout: float, **options: object):
        defaults = {"timeout_keep_alive": 65, "timeout_graceful_shutdown": 10, "lifespan": "on"}
        super().__init__(uvicorn.Config(app, **{**defaults, **options}))  # type: ignore[arg-type]
        self.worker, self.timeout = worker, timeout

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self.worker.drain(self.timeout, lambda: self.force_exit)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals end the server in order; uvicorn would raise them again afterwards."""
        in_main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if in_main else ()
        previous = [signal.signal(number, self.handle_exit) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, previous, strict=True):
                signal.signal(number, handler)


def create_server(
    engine: Engine,
    model: str,
    *,
    api_key: str | None = None,
    max_requests: int = 256,
    max_prompt_tokens: int | None = None,
    max_new_tokens: int | None = None,
    max_body_bytes: int = 8 << 20,
    body_timeout: float = 30,
    request_timeout: float = 600,
    shutdown_timeout: float = 30,
    **options: object,
) -> Server:
    """A server for an engine that has a tokenizer; `main` describes the limits.

    options: of `uvicorn.Config`, such as host and port.
    """
    assert engine.tokenizer is not None
    context = engine.max_length
    limits = Limits(
        context=context,
        prompt_tokens=max_prompt_tokens or context,
        new_tokens=max_new_tokens or context,
        choices=min(64, max_requests),
        body_bytes=max_body_bytes,
        body_seconds=body_timeout,
        seconds=request_timeout,
    )
    worker = EngineWorker(engine, max_requests)
    settings = Settings(model, limits, api_key)
    app = create_app(worker, engine.tokenizer, engine.model.config.vocab_size, settings)
    return Server(app, worker, shutdown_timeout, **options)


def is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(
    checkpoint: Folder = CHECKPOINT,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="DEEPKERN_API_KEY", help="required of clients")
    ] = None,
    model_name: Annotated[str | None, typer.Option(help="as clients name the model")] = None,
    max_requests: Annotated[int, typer.Option(min=1, help="running and waiting; then 429")] = 256,
    max_running: Annotated[int, typer.Option(min=1, help="of those, in one batch")] = 64,
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="of one step")] = 512,
    num_pages: Annotated[int | None, typer.Option(min=1, help="of the cache")] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="of one answer")] = None,
    max_body_bytes: Annotated[int, typer.Option(min=1)] = 8 << 20,
    request_timeout: Annotated[float, typer.Option(min=0, help="seconds")] = 600,
    shutdown_timeout: Annotated[float, typer.Option(min=0, help="seconds")] = 30,
    dtype: Dtype = "float32",
    fp8: Fp8 = False,
    cache_dtype: CacheDtype = None,
    draft_tokens: DraftTokens = 0,
    device: str = "cpu",
) -> None:
    """Serves CHECKPOINT until SIGTERM or Ctrl-C."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        # All ranks must run the same requests, and requests arrive at one of them.
        raise exit_with(ValueError(f"the server runs in 1 process, torchrun started {processes}"))
    if not is_local(host) and not api_key:
        typer.echo(
            f"warning: {host} may be reached from outside, and there is no API key", err=True
        )
    engine = load_engine(
        checkpoint,
        dtype,
        device,
        fp8,
        cache_dtype,
        draft_tokens,
        max_running=max_running,
        max_batch_tokens=max_batch_tokens,
        num_pages=num_pages,
    )
    server = create_server(
        engine,
        model_name or checkpoint.resolve().name,
        api_key=api_key or None,
        max_requests=max_requests,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        max_body_bytes=max_body_bytes,
        request_timeout=request_timeout,
        shutdown_timeout=shutdown_timeout,
        host=host,
        port=port,
    )
    server.run()
    if server.worker.failure is not None:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
