"""Serve a page to this machine alone: on 127.0.0.1, with a secret in the address, as notebooks do."""

import logging
import secrets
import socket
from collections.abc import Callable

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
NAMES = [HOST, "localhost"]
"""Hosts that requests may name: another name that resolves to this machine is refused."""


def private_app(token: str) -> FastAPI:
    """Return an app that answers only requests with the query parameter ``token``; others get 403.

    An error is one line of text as ``detail``: 503 for OSError and ValueError, 422 for a request that is none.
    """
    expected = token.encode()

    def check(token: str = "") -> None:  # FastAPI names the query parameter after the argument
        if not secrets.compare_digest(token.encode(), expected):
            raise HTTPException(403, "expected the address that the command printed, with its token")

    app = FastAPI(dependencies=[Depends(check)], docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=NAMES)
    app.add_exception_handler(OSError, _failed)
    app.add_exception_handler(ValueError, _failed)
    app.add_exception_handler(RequestValidationError, _refused)
    return app


def _failed(request: Request, error: Exception) -> JSONResponse:
    logger.warning("%s: %s", request.url.path, error)
    return JSONResponse({"detail": str(error)}, 503)


def _refused(_: Request, error: Exception) -> JSONResponse:
    """Name what is wrong with the fields of a request, without the values, which may be large."""
    assert isinstance(error, RequestValidationError)
    faults = [f"{'.'.join(map(str, fault['loc'][1:]))}: {fault['msg']}" for fault in error.errors()]
    return JSONResponse({"detail": "; ".join(faults)}, 422)


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
