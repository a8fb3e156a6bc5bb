"""The client of a reward behind HTTP, against the real server and against odd ones."""

import contextlib
import gzip
import socket
import ssl
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

from rewards import remote
from rewards.remote import TOKEN, HttpReward
from tests.helpers.reward_server import reds

pytestmark = pytest.mark.usefixtures("token")


def test_scores_are_returned_unchanged(server):
    assert HttpReward(server)(reds(10, 20, 30, 40), ["a", "none", "nan", "b"]) == [20.0, None, None, 80.0]
    assert HttpReward(server)([], []) == []


def test_images_arrive_to_the_last_bit(server):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[0, 0, 0] = 201
    assert HttpReward(server)([Image.fromarray(pixels)], ["a"]) == [402.0]


@pytest.mark.parametrize(
    ("prompt", "said"), [("raise", "500: .*ValueError: a bad mood"), ("short", "500: .*0 values for 1 images")]
)
def test_errors_of_the_reward_reach_the_client(server, prompt, said):
    with pytest.raises(OSError, match=said):
        HttpReward(server)(reds(1), [prompt])


def test_unusable_servers_are_errors(server):
    with pytest.raises(TimeoutError):
        HttpReward(server, timeout_s=0.5)(reds(1), ["slow"])
    with pytest.raises(OSError, match="127.0.0.1:9: .*refused"):
        HttpReward("http://127.0.0.1:9")(reds(1), ["a"])
    with pytest.raises(OSError, match="answered 405"):
        HttpReward(server.replace("/score", "/health"))(reds(1), ["a"])
    with pytest.raises(ValueError, match="expected http"):
        HttpReward("file:///etc/passwd")


@pytest.mark.parametrize("given", ["", "wrong"])
def test_without_the_token_nothing_is_scored(server, monkeypatch, given):
    monkeypatch.setenv(TOKEN, given)
    with pytest.raises(OSError, match="answered 401"):
        HttpReward(server)(reds(1), ["a"])


ANSWERS = {
    "status": b"nonsense\r\n\r\n",
    "cut off": b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{",
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n[1]",
    "nested": b"HTTP/1.1 200 OK\r\n\r\n" + b'{"scores":' + b"[" * 100_000,
    "huge": b'HTTP/1.1 200 OK\r\n\r\n{"scores": [1' + b"0" * 400 + b"]}",
    "text": b'HTTP/1.1 200 OK\r\n\r\n{"scores": "1"}',
    "texts": b'HTTP/1.1 200 OK\r\n\r\n{"scores": ["1"]}',
    "object": b'HTTP/1.1 200 OK\r\n\r\n{"scores": {"1": 2}}',
    "boolean": b'HTTP/1.1 200 OK\r\n\r\n{"scores": [true]}',
    "two": b'HTTP/1.1 200 OK\r\n\r\n{"scores": [1, 2]}',
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "header": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000,
    "nothing": b"",
    "whole, but shorter than promised": b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"scores": [1]}',
    "absurd length": b'HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n{"scores": [1]}',
    "chunks without an end": b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nf\r\n{"scores": [1]}\r\n',
    "negative chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nxxxxx",
    "negative chunk of an error": b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nxxxxx",
    "gzip": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(b'{"scores": [1]}'),
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "redirect": b"HTTP/1.1 307 Moved\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n",
    "busy": b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n",
    "other protocol": b'HTTP/3 200 OK\r\n\r\n{"scores": [1]}',
}


@contextlib.contextmanager
def raw_server(answer: Callable[[socket.socket], None], scheme: str = "http") -> Iterator[str]:
    """The address of a server that answers each connection as it likes."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection, contextlib.suppress(OSError):
                        answer(connection)

        threading.Thread(target=serve, daemon=True).start()
        yield f"{scheme}://127.0.0.1:{listening.getsockname()[1]}/score"


def answering(text: bytes) -> Callable[[socket.socket], None]:
    """Read a request and answer with ``text``."""

    def answer(connection: socket.socket) -> None:
        asked = b""
        while not asked.endswith(b"]}"):  # over TLS, head and body come one after the other
            asked += connection.recv(100_000)
        connection.sendall(text)

    return answer


def drip(connection: socket.socket, text: bytes = b"1" * 200) -> None:
    """Send a byte now and then."""
    for byte in text:
        connection.sendall(bytes([byte]))
        time.sleep(0.1)


@pytest.mark.parametrize("name", ANSWERS)
def test_odd_answers_are_errors_of_two_kinds(name):
    with raw_server(answering(ANSWERS[name])) as url, pytest.raises((OSError, ValueError)):
        HttpReward(url, timeout_s=10)(reds(1), ["a"])


ENDLESS = {
    "body": b"HTTP/1.1 200 OK\r\n\r\n",
    "body of an error": b"HTTP/1.1 500 No\r\n\r\n",
    "long body": b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n",
    "long chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffff\r\n",
    "chunk of -1 bytes": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
    "chunk of -1 bytes of an error": b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
    "header": b"HTTP/1.1 200 OK\r\nX: ",
    "status": b"HTTP/1.1 200 ",
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    "trailers": b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nf\r\n{"scores": [1]}\r\n0\r\n',
    "other heads": b"",
}
REPEATED = {"chunks": b"ffff\r\n" + bytes(0xFFFF) + b"\r\n", "trailers": b"X: y\r\n" * 9000,
            "other heads": b"HTTP/1.1 100 Continue\r\n\r\n" * 3000}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_answer_fills_no_memory(name, monkeypatch):
    monkeypatch.setattr(remote, "MAX_ANSWER", 2**20)
    piece = REPEATED.get(name, bytes(65536))

    def answer(connection: socket.socket) -> None:
        answering(ENDLESS[name])(connection)
        while True:
            connection.sendall(piece)

    with raw_server(answer) as url:
        tracemalloc.start()
        try:
            with pytest.raises(OSError) as error:
                HttpReward(url, timeout_s=10)(reds(1), ["a"])
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert not isinstance(error.value, TimeoutError) and peak < 6 * 2**20


@pytest.mark.parametrize("where", ["status", "header", "body", "body of an error"])
def test_an_answer_that_drips_ends_at_the_deadline(where):
    before = {
        "status": b"",
        "header": b"HTTP/1.1 200 OK\r\nX: ",
        "body": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",
        "body of an error": b"HTTP/1.1 500 No\r\nContent-Length: 1000\r\n\r\n",
    }[where]

    def answer(connection: socket.socket) -> None:
        answering(before)(connection)
        drip(connection)

    with raw_server(answer) as url, ends_in_time():
        HttpReward(url, timeout_s=1)(reds(1), ["a"])


@contextlib.contextmanager
def ends_in_time() -> Iterator[None]:
    """Expect an error within seconds, and no thread of the request left after a few more."""
    began = time.monotonic()
    with pytest.raises(OSError):
        yield
    assert time.monotonic() - began < 8
    while any(thread.name == "HttpReward" for thread in threading.enumerate()):
        assert time.monotonic() - began < 20
        time.sleep(0.1)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """A self-signed certificate of 127.0.0.1 and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    plain = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(plain + made.public_bytes(serialization.Encoding.PEM))
    return path


def over_tls(certificate: Path, answer: Callable[[socket.socket], None]) -> Callable[[socket.socket], None]:
    """Shake hands and answer."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    def secured(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secure:
            answer(secure)

    return secured


def test_a_server_with_tls_is_asked(certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    said = b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"scores": [2]}'
    with raw_server(over_tls(certificate, answering(said)), "https") as url:
        assert HttpReward(url, timeout_s=20)(reds(1), ["a"]) == [2.0]


def test_an_unknown_certificate_is_refused(certificate):
    with raw_server(over_tls(certificate, answering(b"")), "https") as url, pytest.raises(OSError, match="CERTIFICATE"):
        HttpReward(url, timeout_s=20)(reds(1), ["a"])


@pytest.mark.parametrize("where", ["handshake", "handshake without an end", "header", "body"])
def test_a_server_with_tls_that_drips_ends_at_the_deadline(certificate, monkeypatch, where):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))

    def answer(connection: socket.socket) -> None:
        before = b"HTTP/1.1 200 OK\r\n" + (b"X: " if where == "header" else b"Content-Length: 1000\r\n\r\n")
        answering(before)(connection)
        drip(connection)

    handshakes = {
        "handshake": lambda connection: drip(connection, b"\x16\x03\x03\x40\x00" + b"\x02\x00\x3f\xfc" + bytes(200)),
        "handshake without an end": lambda connection: time.sleep(6),
    }
    with raw_server(handshakes.get(where) or over_tls(certificate, answer), "https") as url, ends_in_time():
        HttpReward(url, timeout_s=1)(reds(1), ["a"])


def test_a_proxy_that_drips_ends_at_the_deadline(monkeypatch):
    monkeypatch.delenv("no_proxy", raising=False)
    with raw_server(lambda connection: drip(connection, b"HTTP/1.1 200 OK\r\nX: " + b"x" * 40)) as url:
        monkeypatch.setenv("https_proxy", url.removesuffix("/score"))
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            HttpReward("https://reward.invalid/score", timeout_s=1)(reds(1), ["a"])
        assert time.monotonic() - began < 4


@pytest.mark.parametrize("token", ["secret\n", "sec\tret", "s\u00e9cret", "\u5bc6"])
def test_a_token_that_no_header_can_have_is_not_repeated(monkeypatch, token):
    monkeypatch.setenv(TOKEN, token)
    with pytest.raises(ValueError, match=f"{TOKEN}: expected printable ASCII") as error:
        HttpReward("http://127.0.0.1:9/score")(reds(1), ["a"])
    assert "cret" not in str(error.value)


def test_a_refused_token_is_not_repeated():
    refusal = b"HTTP/1.1 401 No\r\nContent-Length: 16\r\n\r\nbad token secret"
    with (
        raw_server(answering(refusal)) as url,
        pytest.raises(OSError, match="answered 401: bad token ...") as error,
    ):
        HttpReward(url)(reds(1), ["a"])
    assert "secret" not in str(error.value)


REPEATING = {
    "body": b'HTTP/1.1 200 OK\r\n\r\n{"oops": "secret"}',
    "status": b"secret no\r\n\r\n",
    "reason": b"HTTP/1.1 500 secret\r\nContent-Length: 0\r\n\r\n",
    "cut": b"HTTP/1.1 403 No\r\n\r\n" + b"." * (remote.SHOWN - 3) + b"secret",
    "lines": b"HTTP/1.1 403 No\r\n\r\n\x1b[31ma\r\n\0b\n" + b"secret\n" * 1000,
}


@pytest.mark.parametrize("name", REPEATING)
def test_errors_are_one_short_line_without_the_token(name):
    with raw_server(answering(REPEATING[name])) as url, pytest.raises((OSError, ValueError)) as error:
        HttpReward(f"{url}?key=hidden", timeout_s=10)(reds(1), ["a"])
    told = str(error.value)
    assert told.isprintable() and len(told) < 450
    assert "sec" not in told and "hidden" not in told
    assert error.value.__cause__ is None or "sec" not in str(error.value.__cause__)


def test_a_password_in_an_address_is_refused_and_not_repeated():
    for url in ("http://me:hidden@a/score", "http://me:hidden@a:port/", "http://hidden@[::1/", "http://a:1\\hidden@b/"):
        with pytest.raises(ValueError, match=f"expected no user or password in it; {TOKEN} is sent") as error:
            HttpReward(url)
        assert "hidden" not in str(error.value)
    assert HttpReward("http://a/b@c").url == "http://a/b@c"


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e10, None, "5", True, [1]])
def test_a_time_that_cannot_be_waited_is_refused_at_once(seconds):
    with pytest.raises(ValueError, match=r"timeout_s=.*: expected above 0 and at most 604800"):
        HttpReward("http://a/", timeout_s=seconds)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "LOCALHOST", "127.1", "2130706433", "0x7f000001", "0.0.0.0", "0", "[::ffff:127.0.0.1]"],
)
def test_no_name_of_this_machine_is_asked_through_a_proxy(host, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with raw_server(answering(b'HTTP/1.1 200 OK\r\n\r\n{"scores": [1]}')) as url:
        assert HttpReward(url.replace("127.0.0.1", host), timeout_s=10)(reds(1), ["a"]) == [1.0]


@pytest.mark.parametrize(
    ("host", "here"),
    [("localhost.", True), ("a.localhost.", True), ("ip6-localhost", True), ("::", True), ("::1", True),
     (socket.gethostname().lower(), True), ("127.0.1.1", True), ("10.0.0.1", False), ("reward.invalid", False),
     ("127.0.0.1.invalid", False), ("localhost.invalid", False), ("::ffff:10.0.0.1", False), ("b\u00fccher.de", False)],
)  # fmt: skip
def test_other_hosts_are_asked_through_a_proxy(host, here):
    assert remote._is_loopback(host) == here


def test_the_loopback_is_not_asked_through_a_proxy(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert HttpReward(server)(reds(1), ["a"]) == [2.0]
    with pytest.raises(OSError):  # others are
        HttpReward("http://reward.invalid/score")(reds(1), ["a"])


@pytest.mark.parametrize(
    "url",
    ["ftp://a/b", "http://", "http://a:port/", "http://[::1/", "http://a b/", "http://a/\n", "http://a:0/",
     "http://a:99999/", "http://a:+80/", "http://a..b/", f"http://{'a' * 300}/", "http://a/\u00fc", "http:a", "//a/",
     " http://a/", 5, None, b"http://a/"],
)  # fmt: skip
def test_addresses_that_are_none_are_refused_at_once(url):
    with pytest.raises(ValueError, match="expected http"):
        HttpReward(url)
