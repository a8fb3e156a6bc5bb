"""A reward behind HTTP: send images as base64 PNG in JSON, receive numbers. `rewards.serve` is the server.

    POST URL  {"images": ["<base64 PNG>", ...], "prompts": ["...", ...]}  ->  {"scores": [0.5, null, ...]}

The environment variable REWARD_TOKEN, if set, is sent as a bearer token.
"""

import base64
import json
import os
import urllib.request
from collections.abc import Sequence
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from PIL import Image

from rewards.images import to_png

TOKEN = "REWARD_TOKEN"
MAX_ANSWER = 16 * 2**20
"""Bytes of an answer that are read."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Turn redirects into errors: following one would send the token to another host."""

    def redirect_request(self, *args):
        return None


class HttpReward:
    """The reward at ``url``, such as http://host:8000/score. ``timeout_s`` is for one socket operation.

    OSError if the server does not answer or refuses, ValueError for a malformed answer.
    """

    def __init__(self, url: str, timeout_s: float = 60.0):
        if urlsplit(url).scheme not in ("http", "https"):
            raise ValueError(f"url={url}: expected http://... or https://...")
        self.url, self.timeout_s = url, timeout_s

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
        encoded = [base64.b64encode(to_png(image)).decode() for image in images]
        body = json.dumps({"images": encoded, "prompts": list(prompts)}).encode()
        headers = {"Content-Type": "application/json"}
        if token := os.environ.get(TOKEN):
            headers["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(self.url, body, headers)
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout_s) as answer:
                text = answer.read(MAX_ANSWER)
        except HTTPError as error:
            raise OSError(f"{self.url} answered {error.code}: {error.read(500).decode(errors='replace')}") from error
        except URLError as error:
            raise OSError(f"{self.url}: {error.reason}") from error
        return _scores(text)


def _scores(text: bytes) -> list[float | None]:
    try:
        scores = json.loads(text)["scores"]
        return [None if score is None else float(score) for score in scores]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f'expected {{"scores": [numbers or null]}}, got {text[:100]!r}') from error
