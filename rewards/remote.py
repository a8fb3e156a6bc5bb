"""A reward behind HTTP: send images as base64 PNG in JSON, receive numbers. `rewards.serve` is the server.

    POST URL  {"images": ["<base64 PNG>", ...], "prompts": ["...", ...]}  ->  {"scores": [0.5, null, ...]}

The environment variable REWARD_TOKEN, if set, is sent as a bearer token.
"""

import base64
import contextlib
import http.client
import ipaddress
import json
import os
import socket
import threading
import urllib.request
from collections.abc import Callable, Sequence
from functools import partial
from urllib.error import HTTPError
from urllib.parse import urlsplit

from PIL import Image

from rewards.images import to_png

TOKEN = "REWARD_TOKEN"
MAX_ANSWER = 16 * 2**20
"""Bytes of an answer that are read."""


Watch = Callable[[socket.socket], None]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Turn redirects into errors: following one would send the token to another host."""

    def redirect_request(self, *args):
        return None


class HttpReward:
    """The reward at ``url``, such as http://host:8000/score. ``timeout_s`` is for the whole request and its answer.

    A server on the loopback is never asked through a proxy. OSError if the server does not answer or refuses,
    ValueError for a malformed answer.
    """

    def __init__(self, url: str, timeout_s: float = 60.0):
        try:
            parts = urlsplit(url)
            valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) and url.isprintable()
        except ValueError:  # a port that is none, or half an IPv6 address
            valid = False
        if not valid or " " in url:
            raise ValueError(f"url={url}: expected http://... or https://...")
        self.url, self.timeout_s = url, timeout_s

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
        encoded = [base64.b64encode(to_png(image)).decode() for image in images]
        body = json.dumps({"images": encoded, "prompts": list(prompts)}).encode()
        headers = {"Content-Type": "application/json"}
        if token := os.environ.get(TOKEN):
            if not (token.isascii() and token.isprintable()):
                raise ValueError(f"{TOKEN}: expected printable ASCII characters")  # the library's error repeats it
            headers["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(self.url, body, headers)
        return _scores(self._ask(request), len(images))

    def _ask(self, request: urllib.request.Request) -> bytes:
        """Return the body of the answer. OSError if there is none in time.

        The deadline is for everything: names, connecting, a proxy, TLS, sending and reading. A timeout of a socket is
        for one operation, which a server that sends a byte now and then never exceeds, and names have none.
        """
        found: list[bytes | Exception] = []
        sockets: list[socket.socket] = []
        over = threading.Event()

        def watch(connected: socket.socket) -> None:
            sockets.append(connected)
            if over.is_set():
                _end(connected)

        def ask() -> None:
            try:
                found.append(self._answer(request, watch))
            except Exception as error:
                found.append(error)

        asking = threading.Thread(target=ask, name="HttpReward", daemon=True)
        asking.start()
        asking.join(self.timeout_s)
        late = asking.is_alive()
        over.set()
        for each in sockets:
            _end(each)  # and with it the thread, if it still waits
        if late or isinstance(found[0], TimeoutError):  # what a late thread found may be half an answer
            raise TimeoutError(f"{self.url}: no answer in {self.timeout_s:g} s")
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    def _answer(self, request: urllib.request.Request, watch: Watch) -> bytes:
        direct = [urllib.request.ProxyHandler({})] if _is_loopback(urlsplit(self.url).hostname or "") else []
        opener = urllib.request.build_opener(_NoRedirect, _Http(watch), _Https(watch), *direct)
        try:
            with opener.open(request, timeout=self.timeout_s) as answer:
                return answer.read(MAX_ANSWER)
        except HTTPError as error:
            raise OSError(f"{self.url} answered {error.code}: {self._shown(error)}") from error
        except TimeoutError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise OSError(f"{self.url}: {type(error).__name__}: {error}") from error

    @staticmethod
    def _shown(error: HTTPError) -> str:
        """Return a server's words without the token, which it may repeat: errors are written to the summary."""
        try:
            said = error.read(500).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            return "(no text)"
        token = os.environ.get(TOKEN)
        return said.replace(token, "...") if token else said


def _scores(text: bytes, count: int) -> list[float | None]:
    try:
        scores = json.loads(text)["scores"]
        if not isinstance(scores, list) or any(type(score) not in (int, float, type(None)) for score in scores):
            raise ValueError("scores are not a list of numbers or null")
        if len(scores) != count:
            raise ValueError(f"{len(scores)} scores for {count} images")
        return [None if score is None else float(score) for score in scores]
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise ValueError(f'expected {{"scores": [numbers or null]}}, got {text[:100]!r}') from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _end(connected: socket.socket) -> None:
    with connected, contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


class _Watched(http.client.HTTPConnection):
    """A connection that shows its socket to ``watch``, before TLS begins on it."""

    watch: Watch

    def connect(self) -> None:
        super().connect()
        self.watch(self.sock.dup())  # TLS takes the socket itself away


class _WatchedSecure(http.client.HTTPSConnection, _Watched):
    """The same over TLS: `http.client.HTTPSConnection` connects as the next class does, then shakes hands."""


class _Http(urllib.request.HTTPHandler):
    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_connection, _Watched, self.watch), request)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_connection, _WatchedSecure, self.watch), request)


def _connection(kind: type[_Watched], watch: Watch, host: str, **options) -> _Watched:
    connection = kind(host, **options)
    connection.watch = watch
    return connection
