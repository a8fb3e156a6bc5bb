"""Chat with the model in a terminal: ``python -m vargpt_rl.chat [checkpoint=DIR] [key=value ...]``.

Each line is a turn; lines may be piped in. An impossible request prints one line, and the chat continues. Exit codes:
0 at the end of input, 2 if a setting is wrong.
"""

import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import ClassVar, cast

from PIL import Image

from vargpt_rl.common.command import run_command
from vargpt_rl.data.images import read_image
from vargpt_rl.inference.conversation import Conversation, Reply, ReplyConfig, load
from vargpt_rl.inference.images import DrawingSettings, make_folder, save_image
from vargpt_rl.model.hub import check_model

HELP = """\
/image FILE   show an image with the next turn; may be repeated
/draw [TEXT]  the next reply is an image; with TEXT, that is the turn
/reset        start a new conversation
/quit         end the chat
/help         this list"""


@dataclass(kw_only=True)
class ChatConfig(DrawingSettings):
    """Settings of this command."""

    fallback: ClassVar[int] = 256

    out: str = "runs/chat"
    """Folder for drawn images."""
    temperature: float = ReplyConfig.temperature
    """See ``ReplyConfig``, like the next."""
    max_tokens: int = ReplyConfig.max_tokens

    def __post_init__(self):
        super().__post_init__()
        self.replies = ReplyConfig(self.temperature, self.max_tokens)


SINGLE_TURNS = """\
This checkpoint was trained on single turns: each turn is a new conversation. A question, which ends with a question
mark, is about the images given, else about the last one drawn."""


class Talk:
    """One user's turns with a model. ``begin`` starts a new conversation.

    With ``single_turns``, each turn is a conversation of its own, and a question is about the last image drawn.
    """

    def __init__(self, begin: Callable[[], Conversation], single_turns: bool = False):
        self.begin = begin
        self.single_turns = single_turns
        self.reset()

    def reset(self) -> None:
        """Start a new conversation."""
        self.conversation = self.begin()
        self.last: list[Image.Image] = []

    def say(
        self,
        text: str,
        images: Sequence[Image.Image] = (),
        draw: bool = False,
        adjust: Callable[[Conversation], None] | None = None,
    ) -> Reply:
        """Take one turn, with the images shown in it; ``adjust`` sets the conversation up for it.

        Raises ValueError if that is impossible.
        """
        shown = list(images)
        if self.single_turns:
            self.conversation = self.begin()
            shown = shown or (self.last if text.endswith("?") and not draw else [])
        if adjust:
            adjust(self.conversation)
        reply = self.conversation.say(text, shown, draw)
        self.last = [part.image for part in reply if not isinstance(part, str)][-1:] or self.last
        return reply


class Chat:
    """Answers one user's lines. ``begin`` starts a new conversation; images are saved to ``out``.

    ``single_turns``: see `Talk`.
    """

    def __init__(self, begin: Callable[[], Conversation], out: Path, single_turns: bool = False):
        self.talk = Talk(begin, single_turns)
        self.out = out
        self.images: list[Image.Image] = []
        self.draw = False

    def reset(self) -> None:
        """Start a new conversation."""
        self.talk.reset()
        self.images, self.draw = [], False

    def run(self, lines: Iterable[str]) -> None:
        """Answer line by line, until the end or /quit."""
        for line in map(str.strip, lines):
            if line == "/quit":
                return
            try:
                self.answer(line)
            except ValueError as error:
                print(error, flush=True)

    def answer(self, line: str) -> None:
        """Answer one line. Raises ValueError if that is impossible."""
        command, _, rest = line.partition(" ") if line.startswith("/") else ("", "", line)
        match command, rest.strip():
            case "", "":
                pass  # an empty line
            case "", text:
                self.say(text)
            case "/draw", text:
                self.draw = True
                if text:
                    self.say(text)
            case "/image", "":
                raise ValueError("/image: expected a file")
            case "/image", file:
                self.images.append(read_image(Path(os.path.expanduser(file))))
            case "/reset", _:
                self.reset()
            case "/help", _:
                print(f"{HELP}\n{SINGLE_TURNS}" if self.talk.single_turns else HELP, flush=True)
            case _:
                raise ValueError(f"{line}: no such command, /help lists them")

    def say(self, text: str) -> None:
        """Take one turn, with the images attached to it."""
        images, draw = self.images, self.draw
        self.images, self.draw = [], False
        self.show(self.talk.say(text, images, draw))

    def show(self, reply: Reply) -> None:
        """Print words, and the paths of saved images."""
        for part in reply:
            print(part if isinstance(part, str) else self.save(part.image), flush=True)
        if not reply:
            print("(an empty reply)", flush=True)

    def save(self, image: Image.Image) -> Path:
        """Save an image under the first free number."""
        path = next(path for k in count() if not (path := self.out / f"{k:05d}.png").exists())
        save_image(image, path)
        return path


def typed() -> Iterator[str]:
    """Yield the lines of standard input, with a prompt on a terminal."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401 (makes the line editable)

    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def chat(config: ChatConfig) -> None:
    """Load the model and answer the lines of standard input."""
    folder = check_model(config.checkpoint)
    out = make_folder(config.out)
    model, form = load(folder, config.device, config.dtype)
    seeds = count(config.seed)

    def begin() -> Conversation:
        return Conversation(model, form, config.size, config.sampling, config.replies, next(seeds))

    single = config.defaults.turns == 1
    print("/help lists the commands" + (", each turn is a new conversation" if single else ""), flush=True)
    cast(io.TextIOWrapper, sys.stdin).reconfigure(errors="replace")  # declared as TextIO, which lacks reconfigure
    Chat(begin, out, single).run(typed())


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(ChatConfig, chat, arguments)


if __name__ == "__main__":
    sys.exit(main())
