"""A local page to chat on: ``vargpt-rl chat --page``. Images, seeds, sizes, and two checkpoints side by side.

One conversation with each checkpoint at a time, of as many turns as it was trained on. A turn goes to all of them, with
the same seed and size.
"""

import base64
import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from PIL import Image

from vargpt_rl.chat import NEW, ChatConfig, Talk
from vargpt_rl.common.command import load_command
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

LARGEST_IMAGE = 16 * 2**20
"""Characters of an image that is shown, in base64."""
RESOLUTIONS = (64, 128, 256, 512, 1024)


class Turn(BaseModel):
    """One turn of the user, for all checkpoints."""

    text: str = Field(min_length=1, max_length=8000)
    draw: bool = False
    seed: int = Field(default=0, ge=0, lt=2**32)
    resolution: int = Field(ge=16, le=2048)
    aspect: str = "1:1"
    images: list[Annotated[str, Field(max_length=LARGEST_IMAGE)]] = Field(default=[], max_length=4)


@dataclass
class Speaker:
    """A checkpoint that is talked to."""

    name: str
    talk: Talk

    def answer(self, turn: Turn, images: Sequence[Image.Image]) -> list[dict[str, str | int]]:
        """Return the reply to a turn as parts: a text, or an image with its seed. ValueError if it is impossible."""
        size = image_size(turn.resolution, turn.aspect)

        def adjust(conversation: Conversation) -> None:
            conversation.resize(size)
            conversation.next_seed = turn.seed

        parts = parts_of(self.talk.say(turn.text, images, turn.draw, adjust))
        return [{"text": NEW}, *parts] if self.talk.is_new else parts


def parts_of(reply: Reply) -> list[dict[str, str | int]]:
    """Return a reply as what the page shows."""
    found: list[dict[str, str | int]] = []
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
    """Decode the images of a turn, data URIs. ValueError for one that is none."""
    images = []
    for uri in uris:
        head, _, data = uri.partition(",")
        if not head.startswith("data:image/") or not head.endswith(";base64"):
            raise ValueError("an image is no data URI of an image")
        try:
            images.append(decode(io.BytesIO(base64.b64decode(data, validate=True))))
        except Exception as error:  # Pillow's decoders raise errors of many kinds on broken files
            raise ValueError(f"not a readable image: {error}") from error
    return images


def make_chat_app(speakers: Sequence[Speaker], defaults: Turn, token: str) -> FastAPI:
    """Return the app; ``defaults`` are the size and seed that the page begins with."""
    app = private_app(token)
    speaking = threading.Lock()  # one turn after the other

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        return render_template(
            "chat.html",
            names=[speaker.name for speaker in speakers],
            aspects=list(ASPECTS),
            resolutions=sorted({*RESOLUTIONS, defaults.resolution}),
            start=defaults,
        )

    @app.post("/say")
    def say(turn: Turn) -> dict[str, object]:
        with speaking:
            try:
                images = shown_images(turn.images)
                return {"replies": [speaker.answer(turn, images) for speaker in speakers]}
            except ValueError as error:
                raise HTTPException(422, str(error)) from error

    @app.post("/reset")
    def reset() -> dict[str, object]:
        with speaking:
            for speaker in speakers:
                speaker.talk.reset()
        return {}

    return app


def make_speaker(config: ChatConfig) -> Speaker:
    """Load a checkpoint to talk to."""
    model, form = load(check_model(config.checkpoint), config.device, config.dtype)

    def begin() -> Conversation:
        return Conversation(model, form, config.size, config.sampling, config.replies, config.seed)

    name = str(Path(config.checkpoint)) if config.checkpoint else ""
    return Speaker(name, Talk(begin, config.defaults.turns))


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
