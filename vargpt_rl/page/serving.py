"""Serve a page to this machine alone: on 127.0.0.1, with a secret in the address, as notebooks do."""

import secrets
import socket
from collections.abc import Callable

from fastapi import Depends, FastAPI, HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

HOST = "127.0.0.1"
NAMES = [HOST, "localhost"]
"""Hosts that requests may name: another name that resolves to this machine is refused."""


def private_app(token: str) -> FastAPI:
    """Return an app that answers only requests with the query parameter ``token``; others get 403."""
    expected = token.encode()

    def check(token: str = "") -> None:  # FastAPI names the query parameter after the argument
        if not secrets.compare_digest(token.encode(), expected):
            raise HTTPException(403, "expected the address that the command printed, with its token")

    app = FastAPI(dependencies=[Depends(check)], docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=NAMES)
    return app


def serve(app: FastAPI, token: str, port: int, announce: Callable[[str], None]) -> None:
    """Serve until Ctrl-C on ``port`` (0: a free one); ``announce`` gets the address. OSError if the port is taken."""
    import uvicorn

    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen()  # before the address is told, so that nobody is refused
        announce(f"http://{HOST}:{listener.getsockname()[1]}/?token={token}")
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def new_token() -> str:
    """Return a fresh secret."""
    return secrets.token_urlsafe(24)
