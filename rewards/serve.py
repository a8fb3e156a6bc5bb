"""Serve a reward over HTTP, for `rewards.remote`: ``python -m rewards.serve path=file.py:name [port=8000] [host=...]``.

``options={"key": value}`` (JSON) go to a class's constructor. GET /health answers once the server is up. If the
environment variable REWARD_TOKEN is set, /score requires it as a bearer token; hosts other than the loopback need it.
Requests are scored one at a time. Connections, requests in memory, their pixels, and the time to send one and to answer
it are bounded. Needs the extra ``serve``.
"""

import asyncio
import base64
import binascii
import contextlib
import hmac
import ipaddress
import json
import logging
import math
import os
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Annotated, TypeAlias, TypeVar

from PIL import Image

from rewards import Reward
from rewards.images import from_png
from rewards.remote import TOKEN
from vargpt_rl.common.command import CommandFailed, run_command
from vargpt_rl.common.plugins import make_plugin
from vargpt_rl.common.settings import Between, Seconds

if not (find_spec("fastapi") and find_spec("uvicorn")):
    raise ValueError("rewards.serve needs the extra 'serve': pip install 'vargpt-rl[serve]'")

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Scores: TypeAlias = dict[str, list[float | None]]

MAX_BODY = 128 * 2**20  # bytes
MAX_IMAGES = 256
MAX_PIXELS = 4096 * 4096  # of one image
MAX_REQUEST_PIXELS = 4 * MAX_PIXELS
MAX_COMMAS = 2**20
HELD = 4
"""Requests whose body is in memory; the others wait unread."""
CONNECTIONS = 256
"""More are refused with 503."""
HEADER_S = 10.0
"""Seconds in which a new connection must have sent the header of a request."""
BODY_S = 60.0
"""Seconds in which a request must have sent its body."""
SHUTDOWN_S = 10
"""Seconds that running requests have after SIGTERM."""


@dataclass
class Serve:
    """The reward to serve, and the address."""

    path: str
    options: str = "{}"
    port: Annotated[int, Between(1, 65535)] = 8000
    host: str = "127.0.0.1"
    timeout_s: Seconds = 600.0
    """Seconds until a request is answered with 503, its wait for others included. After as many seconds in the reward
    itself the program ends with exit code 1, since a hung call cannot be stopped in any other way."""


def make_app(reward: Reward, token: str | None, timeout_s: float, give_up: Callable[[], None]) -> FastAPI:
    """Build the server of one reward. ``give_up`` is called if a call of the reward takes more than ``timeout_s``."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    held = asyncio.Semaphore(HELD)
    one_at_a_time = asyncio.Lock()  # decoded images too are held for one request at a time

    def answer(body: bytearray) -> Scores | HTTPException:
        """Errors are returned: a raised one holds the frames it came through, and with them images, for some time."""
        try:
            images, prompts = _read(body)
        except ValueError as error:
            return HTTPException(400, str(error))
        try:
            scores = reward(images, prompts)
            if len(scores) != len(images):
                raise ValueError(f"the reward returned {len(scores)} values for {len(images)} images")
            numbers = [math.nan if score is None else float(score) for score in scores]
        except Exception as error:  # of the plug-in: the client gets the message, the log the traceback
            logger.exception("the reward failed")
            return HTTPException(500, f"{type(error).__name__}: {error}")
        return {"scores": [number if math.isfinite(number) else None for number in numbers]}

    async def answer_in_time(request: Request) -> Scores | HTTPException:
        body = await _body(request)
        async with _turn(one_at_a_time, timeout_s):
            watch = asyncio.get_running_loop().call_later(timeout_s, give_up)
            try:
                return await _in_daemon(partial(answer, body))
            finally:
                watch.cancel()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/score")
    async def score(request: Request) -> Scores:
        given = request.headers.get("authorization", "")
        if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, f"expected the server's {TOKEN} as a bearer token")
        async with _turn(held, timeout_s):
            found = await answer_in_time(request)
        if isinstance(found, HTTPException):
            raise found
        return found

    return app


@contextlib.asynccontextmanager
async def _turn(lock: asyncio.Semaphore | asyncio.Lock, timeout_s: float) -> AsyncIterator[None]:
    """Hold ``lock``. HTTPException 503 if it is not free in time."""
    try:
        await asyncio.wait_for(lock.acquire(), timeout_s)
    except TimeoutError as error:
        raise HTTPException(503, f"the request had no turn within {timeout_s:g} s") from error
    try:
        yield
    finally:
        lock.release()


async def _in_daemon(work: Callable[[], Result]) -> Result:
    """Return what ``work`` does in a thread that does not keep the program from ending."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # a plug-in may raise even SystemExit
            future.set_exception(error)

    future.set_running_or_notify_cancel()  # it cannot be cancelled
    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(future)


async def _body(request: Request) -> bytearray:
    """Read a request. HTTPException for one that is too large, does not arrive in time, or is given up."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise HTTPException(413, f"more than {MAX_BODY} bytes: send fewer images at once")
    except TimeoutError as error:
        raise HTTPException(408, f"the request was not sent within {BODY_S:g} s") from error
    except ClientDisconnect as error:
        raise HTTPException(400, "the client left") from error
    return body


def _read(body: bytearray) -> tuple[list[Image.Image], list[str]]:
    """The images and prompts of a request. ValueError for a malformed one."""
    if body.count(b",") > MAX_COMMAS:  # each may be an empty list, which takes twenty times its bytes
        raise ValueError(f"more than {MAX_COMMAS} commas")
    try:
        given = json.loads(body)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("not JSON: too deeply nested") from error
    if not isinstance(given, dict) or given.keys() != {"images", "prompts"}:
        raise ValueError('expected {"images": [...], "prompts": [...]}')
    images, prompts = given["images"], given["prompts"]
    for name, values in given.items():
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ValueError(f"{name}: expected a list of strings")
    if len(images) != len(prompts) or len(images) > MAX_IMAGES:
        raise ValueError(f"{len(images)} images, {len(prompts)} prompts: expected equally many, at most {MAX_IMAGES}")
    decoded: list[Image.Image] = []
    room = MAX_REQUEST_PIXELS
    for i, image in enumerate(images):
        try:
            decoded.append(from_png(base64.b64decode(image, validate=True), min(MAX_PIXELS, room)))
            room -= decoded[-1].width * decoded[-1].height
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"images[{i}]: {error}") from error
    return decoded, prompts


def serve(command: Serve) -> None:
    """Run the server until it is stopped. ValueError for a bad plug-in, or a public host without a token."""
    token = os.environ.get(TOKEN)
    if not token and not _loopback(command.host):
        raise ValueError(f"host={command.host}: set the environment variable {TOKEN} to serve other machines")
    reward = make_plugin(command.path, _options(command.options))
    hung = threading.Event()

    def give_up() -> None:
        hung.set()
        server.should_exit = True

    config = uvicorn.Config(
        make_app(reward, token, command.timeout_s, give_up),
        host=command.host,
        port=command.port,
        http=_TimedHttp,
        ws="none",
        log_level="warning",
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    server = uvicorn.Server(config)
    server.run()
    if hung.is_set():
        raise CommandFailed(f"path={command.path}: the reward did not return within {command.timeout_s:g} s")
    if not server.started:
        raise CommandFailed(f"port={command.port}: cannot be listened on")


class _TimedHttp(H11Protocol):
    """HTTP on a connection that is closed unless the header of a request comes in time, the first or a further one."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as the class above
        super().connection_made(transport)
        self._expect_header()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_header()

    def _expect_header(self) -> None:
        self.loop.call_later(HEADER_S, self._close_unless_asked, self.cycle)

    def _close_unless_asked(self, before: object) -> None:
        if self.cycle is before:
            self.transport.close()


def _options(text: str) -> dict[str, object]:
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise ValueError(f'options={text}: expected JSON such as {{"key": 1}}')
    return options


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(Serve, serve, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
