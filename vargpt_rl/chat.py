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
from vargpt_rl.model.drawing_defaults import NO_EDITS
from vargpt_rl.model.hub import check_model

HELP = """\
/image FILE   show an image with the next turn; may be repeated
/draw [TEXT]  the next reply is an image; with TEXT, that is the turn
/edit TEXT    change the image given by /image, or else the last one shown or drawn
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


NEW = "(a new conversation)"
UNTRAINED = f"This checkpoint {NO_EDITS}."


def described(turns: int) -> str:
    """Tell a user of a checkpoint that was trained on conversations of so many turns what follows from that."""
    after = "each turn is" if turns == 1 else f"after {turns} turns comes"
    return f"""\
This checkpoint was trained on conversations of {turns} turn{"s" if turns > 1 else ""}: {after} a new conversation.
A question in one that has no image yet, which ends with a question mark, is about the last image shown or drawn."""


class Talk:
    """One user's turns with a model. ``begin`` starts a new conversation.

    One also starts after ``turns`` turns, those of the longest conversations that the model was trained on, if that is
    known; ``is_new`` tells whether the last turn that was taken began one so, unless every turn does. A question in a
    conversation without images shows the last image that was shown or drawn before.
    """

    def __init__(self, begin: Callable[[], Conversation], turns: int | None = None):
        self.begin = begin
        self.turns = turns
        self.reset()

    def reset(self) -> None:
        """Start a new conversation."""
        self._start()
        self.last: list[Image.Image] = []
        self.is_new = False

    def _start(self) -> None:
        self.conversation = self.begin()
        self.taken = 0
        self.has_image = False

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
        if self.taken == self.turns:
            self._start()
            self.is_new = self.turns != 1
        elif self.taken:
            self.is_new = False
        asks = text.endswith("?") and not draw
        shown = list(images) or ([] if self.has_image or not asks else self.last)
        if adjust:
            adjust(self.conversation)
        reply = self.conversation.say(text, shown, draw)
        self.taken += 1
        seen = [*shown, *(part.image for part in reply if not isinstance(part, str))]
        self.has_image = self.has_image or bool(seen)
        self.last = seen[-1:] or self.last
        return reply


class Chat:
    """Answers one user's lines. ``begin`` starts a new conversation; images are saved to ``out``.

    ``turns``: see `Talk`. ``edits``: whether the model was trained on edits, None if unknown.
    """

    def __init__(
        self, begin: Callable[[], Conversation], out: Path, turns: int | None = None, edits: bool | None = None
    ):
        self.talk = Talk(begin, turns)
        self.out = out
        self.edits = edits
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
            case "/edit", text:
                self.edit(text)
            case "/image", "":
                raise ValueError("/image: expected a file")
            case "/image", file:
                self.images.append(read_image(Path(os.path.expanduser(file))))
            case "/reset", _:
                self.reset()
            case "/help", _:
                print(f"{HELP}\n{described(self.talk.turns)}" if self.talk.turns else HELP, flush=True)
            case _:
                raise ValueError(f"{line}: no such command, /help lists them")

    def say(self, text: str) -> None:
        """Take one turn, with the images attached to it."""
        images, draw = self.images, self.draw
        self.images, self.draw = [], False
        reply = self.talk.say(text, images, draw)
        if self.talk.is_new:
            print(NEW, flush=True)
        self.show(reply)

    def edit(self, text: str) -> None:
        """Show the images attached to the turn, else the last one seen, and draw what ``text`` makes of it."""
        if not text:
            raise ValueError("/edit: expected what to change")
        self.images = self.images or list(self.talk.last)
        if not self.images:
            raise ValueError("/edit: there is no image yet, draw one or give one by /image FILE")
        if self.edits is False:
            print(UNTRAINED, flush=True)
        self.draw = True
        self.say(text)

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
    turns = config.defaults.turns
    seeds = count(config.seed, turns or 1)  # a conversation's k-th image has its seed plus k

    def begin() -> Conversation:
        return Conversation(model, form, config.size, config.sampling, config.replies, next(seeds))

    print("/help lists the commands" + (", each turn is a new conversation" if turns == 1 else ""), flush=True)
    cast(io.TextIOWrapper, sys.stdin).reconfigure(errors="replace")  # declared as TextIO, which lacks reconfigure
    Chat(begin, out, turns, config.defaults.edits).run(typed())


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(ChatConfig, chat, arguments)


if __name__ == "__main__":
    sys.exit(main())
