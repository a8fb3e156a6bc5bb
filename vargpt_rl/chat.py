"""Talk to the model in a terminal: ``python -m vargpt_rl.chat [checkpoint=DIR] [key=value ...]``.

A line is a turn; lines may also be piped in. What cannot be done is said in a line, and the chat goes on. Exit codes:
0 when the lines end, 2 when a setting is wrong.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from PIL import Image

from vargpt_rl.common.command import run_command
from vargpt_rl.data.images import read_image
from vargpt_rl.inference.conversation import Conversation, Reply, ReplyConfig, load
from vargpt_rl.inference.images import DrawingSettings, make_folder, save_image
from vargpt_rl.model.hub import check_model

HELP = """\
/image FILE   show an image with the next turn; may be repeated
/draw [TEXT]  the next reply is an image; with TEXT, that is the turn
/reset        begin a new conversation
/quit         end the chat
/help         this list"""


@dataclass(kw_only=True)
class ChatConfig(DrawingSettings):
    """Drawn images go to ``out``. ``temperature`` 0 takes the likeliest words, ``max_tokens`` of a reply at most."""

    out: str = "runs/chat"
    resolution: int = 256
    temperature: float = ReplyConfig.temperature
    max_tokens: int = ReplyConfig.max_tokens

    def __post_init__(self):
        super().__post_init__()
        self.replies = ReplyConfig(self.temperature, self.max_tokens)


class Chat:
    """One user's lines and what is printed for them. ``begin`` makes a new conversation; images go to ``out``."""

    def __init__(self, begin: Callable[[], Conversation], out: Path):
        self.begin, self.out = begin, out
        self.reset()

    def reset(self) -> None:
        """Forget everything that was said."""
        self.conversation = self.begin()
        self.images, self.draw = [], False

    def run(self, lines: Iterable[str]) -> None:
        """Answer line by line, until they end or one says /quit."""
        for line in map(str.strip, lines):
            if line == "/quit":
                return
            try:
                self.answer(line)
            except ValueError as error:
                print(error, flush=True)

    def answer(self, line: str) -> None:
        """Do what one line asks. ValueError when that cannot be done."""
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
                print(HELP, flush=True)
            case _:
                raise ValueError(f"{line}: no such command, /help lists them")

    def say(self, text: str) -> None:
        """One turn, with the images that were attached for it."""
        images, draw = self.images, self.draw
        self.images, self.draw = [], False
        self.show(self.conversation.say(text, images, draw))

    def show(self, reply: Reply) -> None:
        """Print words, and where images were saved."""
        for part in reply:
            print(part if isinstance(part, str) else self.save(part.image), flush=True)
        if not reply:
            print("(an empty reply)", flush=True)

    def save(self, image: Image.Image) -> Path:
        """Write an image under the first number that is free."""
        path = next(path for k in count() if not (path := self.out / f"{k:05d}.png").exists())
        save_image(image, path)
        return path


def typed() -> Iterator[str]:
    """The lines of standard input; a person is shown a prompt."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401 (lets the line be edited)

    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def chat(config: ChatConfig) -> None:
    """Load the model and answer the lines of standard input."""
    folder, out = check_model(config.checkpoint), make_folder(config.out)
    model, form = load(folder, config.device, config.dtype)
    seeds = count(config.seed)

    def begin() -> Conversation:
        return Conversation(model, form, config.size, config.sampling, config.replies, next(seeds))

    print("/help lists the commands", flush=True)
    sys.stdin.reconfigure(errors="replace")
    Chat(begin, out).run(typed())


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit code."""
    return run_command(ChatConfig, chat, arguments)


if __name__ == "__main__":
    sys.exit(main())
