"""A reward behind HTTP: send images as base64 PNG in JSON, receive numbers. `rewards.serve` is the server.

    POST URL  {"images": ["<base64 PNG>", ...], "prompts": ["...", ...]}  ->  {"scores": [0.5, null, ...]}

The environment variable REWARD_TOKEN, if set, is sent as a bearer token.
"""

import base64
import contextlib
import http.client
import io
import ipaddress
import json
import os
import re
import socket
import threading
import urllib.request
from collections.abc import Callable, Sequence
from functools import partial
from urllib.error import HTTPError
from urllib.parse import urlsplit

from PIL import Image

from rewards.images import to_png
from vargpt_rl.common.settings import SECONDS

TOKEN = "REWARD_TOKEN"
MAX_ANSWER = 16 * 2**20
"""Bytes of an answer that are read, its head included."""
SHOWN = 300
"""Characters of a server's words that an error repeats."""
LOOPBACK = {"localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback"}


Watch = Callable[[socket.socket], None]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Turn redirects into errors: following one would send the token to another host."""

    def redirect_request(self, *args):
        return None


class HttpReward:
    """The reward at ``url``, such as http://host:8000/score. ``timeout_s`` is for the whole request and its answer.

    A server on this machine is never asked through a proxy. OSError if the server does not answer or refuses,
    ValueError for a malformed answer; neither repeats the token, a password or the query of the address.
    """

    def __init__(self, url: str, timeout_s: float = 60.0):
        self.shown, users = re.subn("^([^/]*//)[^/]*@", r"\1", str(url).partition("?")[0])
        if users:
            raise ValueError(f"url={self.shown}: expected no user or password in it; {TOKEN} is sent instead")
        if not _is_address(url):
            raise ValueError(f"url={self.shown}: expected http://... or https://..., of ASCII behind the host")
        if timeout_s not in SECONDS:
            raise ValueError(f"timeout_s={timeout_s}: expected {SECONDS}")
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
            raise TimeoutError(f"{self.shown}: no answer in {self.timeout_s:g} s")
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    def _answer(self, request: urllib.request.Request, watch: Watch) -> bytes:
        direct = [urllib.request.ProxyHandler({})] if _is_loopback(urlsplit(self.url).hostname or "") else []
        opener = urllib.request.build_opener(_NoRedirect, _Http(watch), _Https(watch), *direct)
        try:
            with opener.open(request, timeout=self.timeout_s) as answer:
                text = answer.read(MAX_ANSWER)
                if answer.length:
                    raise http.client.HTTPException(f"the answer breaks off {answer.length} bytes before its end")
                return text
        except HTTPError as error:  # without it as a cause, since its words may have the token
            raise OSError(f"{self.shown} answered {error.code}: {_words(error)}") from None
        except TimeoutError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise OSError(f"{self.shown}: {type(error).__name__}: {_plain(str(error))}") from None


def _is_address(url: object) -> bool:
    if not isinstance(url, str):
        return False
    try:
        parts = urlsplit(url)
        (parts.hostname or "").encode("idna")
        port = parts.port
    except ValueError:  # a port that is none, half an IPv6 address, a name that no host has
        return False
    plain = url.isprintable() and " " not in url and (parts.path + parts.query).isascii()
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0 and plain


def _words(error: HTTPError) -> str:
    """Return the words of a refusal."""
    try:
        said = error.read(SHOWN + len(os.environ.get(TOKEN, "")))  # a token is cut nowhere
    except (OSError, http.client.HTTPException, ValueError):
        return "(no text)"
    return _plain(said.decode(errors="replace"))


def _plain(said: str) -> str:
    """Return a server's words for an error, which is written to the summary: one short line, without the token."""
    if token := os.environ.get(TOKEN):
        said = said.replace(token, "...")
    return "".join(letter if letter.isprintable() else " " for letter in said[:SHOWN])


def _scores(text: bytes, count: int) -> list[float | None]:
    try:
        scores = json.loads(text)["scores"]
        if not isinstance(scores, list) or any(type(score) not in (int, float, type(None)) for score in scores):
            raise ValueError("scores are not a list of numbers or null")
        if len(scores) != count:
            raise ValueError(f"{len(scores)} scores for {count} images")
        return [None if score is None else float(score) for score in scores]
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        said = _plain(text[: 10 * SHOWN].decode(errors="replace"))
        raise ValueError(f'expected {{"scores": [numbers or null]}}, got {said!r}') from error


def _is_loopback(host: str) -> bool:
    """Tell whether a host is this machine, which no proxy needs to reach."""
    name = host.removesuffix(".")
    if name in LOOPBACK or name.endswith(".localhost") or name == socket.gethostname().lower():
        return True
    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        try:
            address = ipaddress.IPv4Address(socket.inet_aton(name))  # "127.1", "0x7f000001"
        except (OSError, ValueError):
            return False
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    return address.is_loopback or address.is_unspecified


def _end(connected: socket.socket) -> None:
    with connected, contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


class _Bounded(io.RawIOBase):
    """A server's answer, up to `MAX_ANSWER` bytes whatever it says of lengths and chunks."""

    def __init__(self, source: io.RawIOBase):
        self.source = source
        self.left = MAX_ANSWER

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int | None:  # type: ignore[override]  # the base has no name for it
        count = self.source.readinto(buffer)
        self.left -= count or 0
        if self.left < 0:
            raise http.client.HTTPException(f"an answer of more than {MAX_ANSWER} bytes")
        return count

    def close(self) -> None:
        self.source.close()
        super().close()


class _Answer(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *arguments, **options):
        super().__init__(sock, *arguments, **options)
        self.fp = io.BufferedReader(_Bounded(self.fp.detach()))


class _Watched(http.client.HTTPConnection):
    """A connection that shows its socket to ``watch``, before TLS begins on it."""

    watch: Watch
    response_class = _Answer

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
