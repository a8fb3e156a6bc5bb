"""Serve a reward over HTTP, for `rewards.remote`: ``python -m rewards.serve path=file.py:name [port=8000] [host=...]``.

``options={"key": value}`` (JSON) go to a class's constructor. GET /health answers once the server is up. If the
environment variable REWARD_TOKEN is set, /score requires it as a bearer token; hosts other than the loopback need it.
Requests are scored one at a time. Connections, requests in memory, their pixels and the time to send one are bounded.
Needs the extra ``serve``.
"""

import asyncio
import base64
import binascii
import hmac
import ipaddress
import json
import logging
import math
import os
import threading
from dataclasses import dataclass
from importlib.util import find_spec

from PIL import Image

from rewards import Reward
from rewards.images import from_png
from rewards.remote import TOKEN
from vargpt_rl.common.command import run_command
from vargpt_rl.common.plugins import make_plugin

if not (find_spec("fastapi") and find_spec("uvicorn")):
    raise ValueError("rewards.serve needs the extra 'serve': pip install 'vargpt-rl[serve]'")

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool

logger = logging.getLogger(__name__)

MAX_BODY = 128 * 2**20  # bytes
MAX_IMAGES = 256
MAX_PIXELS = 4096 * 4096  # of one image
MAX_REQUEST_PIXELS = 4 * MAX_PIXELS
HELD = 4
"""Requests whose body is in memory; the others wait unread."""
CONNECTIONS = 256
"""More are refused with 503."""
BODY_S = 60.0
"""Seconds in which a request must have sent its body."""
SHUTDOWN_S = 10
"""Seconds that running requests have after SIGTERM."""


@dataclass
class Serve:
    """The reward to serve, and the address."""

    path: str
    options: str = "{}"
    port: int = 8000
    host: str = "127.0.0.1"


def make_app(reward: Reward, token: str | None) -> FastAPI:
    """Build the server of one reward."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    one_at_a_time = threading.Lock()
    held = asyncio.Semaphore(HELD)

    def answer(body: bytes) -> dict[str, list[float | None]]:
        with one_at_a_time:  # decoded images too are held for one request at a time
            try:
                images, prompts = _read(body)
            except ValueError as error:
                raise HTTPException(400, str(error)) from error
            scores = reward(images, prompts)
        if len(scores) != len(images):
            raise ValueError(f"the reward returned {len(scores)} values for {len(images)} images")
        numbers = [math.nan if score is None else float(score) for score in scores]
        return {"scores": [number if math.isfinite(number) else None for number in numbers]}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/score")
    async def score(request: Request) -> dict[str, list[float | None]]:
        given = request.headers.get("authorization", "")
        if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, f"expected the server's {TOKEN} as a bearer token")
        async with held:
            try:
                async with asyncio.timeout(BODY_S):
                    body = await _body(request)
            except TimeoutError as error:
                raise HTTPException(408, f"the request was not sent within {BODY_S:g} s") from error
            try:
                return await run_in_threadpool(answer, body)
            except HTTPException:
                raise
            except Exception as error:  # of the plug-in: the client gets the message, the log the traceback
                logger.exception("the reward failed")
                raise HTTPException(500, f"{type(error).__name__}: {error}") from error

    return app


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"more than {MAX_BODY} bytes: send fewer images at once")
    return bytes(body)


def _read(body: bytes) -> tuple[list[Image.Image], list[str]]:
    """The images and prompts of a request. ValueError for a malformed one."""
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
    uvicorn.run(
        make_app(reward, token),
        host=command.host,
        port=command.port,
        log_level="warning",
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )


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
