"""A local page to chat on: ``vargpt-rl chat --page``. Images, seeds, sizes, and two checkpoints side by side.

One conversation with each checkpoint at a time, of as many turns as it was trained on. A turn goes to all of them, with
the same seed and size. Where one does not take it, its error is shown instead of its reply. The server keeps what was
said, so that a page that is loaded again shows it.
"""

import base64
import io
import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from vargpt_rl.chat import NEW, UNTRAINED, ChatConfig, Talk, described
from vargpt_rl.common.command import load_command
from vargpt_rl.common.errors import first_line
from vargpt_rl.data.images import decode
from vargpt_rl.inference.conversation import Conversation, Reply, load
from vargpt_rl.inference.images import ASPECTS, image_size
from vargpt_rl.model.hub import check_model
from vargpt_rl.page.render import render_template

if not (find_spec("fastapi") and find_spec("uvicorn")):
    raise ValueError("chat --page needs the extra 'serve': pip install 'vargpt-rl[serve]'")

from fastapi import FastAPI, HTTPException
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field

from vargpt_rl.page.serving import new_token, private_app, serve

logger = logging.getLogger(__name__)

LARGEST_IMAGE = 12 * 2**20
"""Bytes of an image that is shown, at most."""
TURNS_SHOWN = 100
"""Turns that a page shows when it is loaded again, at most."""
RESOLUTIONS = (64, 128, 256, 512, 1024)


class Turn(BaseModel):
    """One turn of the user, for all checkpoints."""

    text: str = Field(min_length=1, max_length=8000)
    draw: bool = False
    seed: int = Field(default=0, ge=0, lt=2**32)
    resolution: int = Field(ge=16, le=2048)
    aspect: str = "1:1"
    images: list[str] = Field(default=[], max_length=4)


Parts = list[dict[str, str | int]]
"""A reply as the page shows it: a text, an error, or an image with its seed."""


@dataclass
class Speaker:
    """A checkpoint that is talked to."""

    name: str
    talk: Talk
    edits: bool | None = None
    """Whether it was trained on edits; None is unknown."""

    @property
    def note(self) -> str:
        """The length of its conversations in words; empty if unknown."""
        return described(self.talk.turns) if self.talk.turns else ""

    def answer(self, turn: Turn, images: Sequence[Image.Image]) -> Parts:
        """Return the reply to a turn. ValueError if it is impossible."""
        size = image_size(turn.resolution, turn.aspect)

        def adjust(conversation: Conversation) -> None:
            conversation.resize(size)
            conversation.next_seed = turn.seed

        parts = parts_of(self.talk.say(turn.text, images, turn.draw, adjust))
        notes: Parts = [{"text": NEW}] if self.talk.is_new else []
        if images and turn.draw and self.edits is False:
            notes.append({"text": UNTRAINED})
        return [*notes, *parts]


def answers(speakers: Sequence[Speaker], turn: Turn) -> list[Parts]:
    """Return the reply of each checkpoint to a turn; those that do not take it have an error instead.

    One that fails begins a new conversation. ValueError if none takes the turn.
    """
    images = shown_images(turn.images)
    image_size(turn.resolution, turn.aspect)
    replies: list[Parts] = []
    refusals = []
    for speaker in speakers:
        try:
            replies.append(speaker.answer(turn, images))
        except ValueError as error:
            refusals.append(str(error))
            replies.append([{"error": f"This turn was not taken: {error}"}])
        except Exception as error:  # such as too little memory: a part of the turn may have been read
            logger.exception("%s failed", speaker.name)
            speaker.talk.reset()
            replies.append([{"error": f"{type(error).__name__}: {first_line(error)}. A new conversation begins."}])
    if len(refusals) == len(speakers):
        raise ValueError("; ".join(dict.fromkeys(refusals)))
    return replies


def parts_of(reply: Reply) -> Parts:
    """Return a reply as what the page shows."""
    found: Parts = []
    for part in reply:
        if isinstance(part, str):
            found.append({"text": part})
            continue
        buffer = io.BytesIO()
        part.image.save(buffer, "PNG")
        encoded = base64.b64encode(buffer.getvalue()).decode()
        found.append({"image": f"data:image/png;base64,{encoded}", "seed": part.seed})
    return found or [{"text": "(an empty reply)"}]


def shown_images(uris: Sequence[str]) -> list[Image.Image]:
    """Decode the images of a turn, data URIs. ValueError for one that is none, or too large."""
    images = []
    for uri in uris:
        head, _, data = uri.partition(",")
        if not head.startswith("data:image/") or not head.endswith(";base64"):
            raise ValueError("an image is no data URI of an image")
        if (size := len(data) * 3 // 4) > LARGEST_IMAGE:
            raise ValueError(f"an image has {size / 2**20:.1f} MiB, expected at most {LARGEST_IMAGE / 2**20:g} MiB")
        try:
            images.append(decode(io.BytesIO(base64.b64decode(data, validate=True))))
        except Exception as error:  # Pillow's decoders raise errors of many kinds on broken files
            raise ValueError(f"not a readable image: {error}") from error
    return images


def make_chat_app(speakers: Sequence[Speaker], defaults: Turn, token: str) -> FastAPI:
    """Return the app; ``defaults`` are the size and seed that the page begins with."""
    app = private_app(token)
    speaking = threading.Lock()  # one turn after the other
    taken: deque[dict[str, Any]] = deque(maxlen=TURNS_SHOWN)

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        return render_template(
            "chat.html",
            speakers=speakers,
            largest=LARGEST_IMAGE,
            aspects=list(ASPECTS),
            resolutions=sorted({*RESOLUTIONS, defaults.resolution}),
            start=defaults,
        )

    @app.get("/turns")
    def turns() -> list[dict[str, Any]]:
        with speaking:
            return list(taken)

    @app.post("/say")
    def say(turn: Turn) -> dict[str, Any]:
        with speaking:
            try:
                replies = answers(speakers, turn)
            except ValueError as error:
                raise HTTPException(422, str(error)) from error
            taken.append({"text": turn.text, "images": turn.images, "replies": replies})
            return taken[-1]

    @app.post("/reset")
    def reset() -> dict[str, object]:
        with speaking:
            for speaker in speakers:
                speaker.talk.reset()
            taken.clear()
        return {}

    return app


def make_speaker(config: ChatConfig) -> Speaker:
    """Load a checkpoint to talk to."""
    model, form = load(check_model(config.checkpoint), config.device, config.dtype)

    def begin() -> Conversation:
        return Conversation(model, form, config.size, config.sampling, config.replies, config.seed)

    name = str(Path(config.checkpoint)) if config.checkpoint else ""
    return Speaker(name, Talk(begin, config.defaults.turns), config.defaults.edits)


def serve_chat(arguments: list[str], beside: str | None, port: int) -> None:
    """Serve the page until Ctrl-C. ValueError for a bad setting, OSError if the port is taken."""
    first = load_command(ChatConfig, arguments)
    configs = [first]
    if beside is not None:
        others = [argument for argument in arguments if not argument.startswith("checkpoint=")]
        configs.append(load_command(ChatConfig, [*others, f"checkpoint={beside}"]))
    assert first.resolution is not None  # resolved with the settings
    defaults = Turn(text="-", seed=first.seed, resolution=first.resolution, aspect=first.aspect)
    token = new_token()
    app = make_chat_app([make_speaker(config) for config in configs], defaults, token)
    serve(app, token, port, lambda address: print(f"chat: {address}", flush=True))
