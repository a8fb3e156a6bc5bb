"""What is asked of a language model, and what is made of its tokens; the engines behind are interchangeable.

``TransformersEngine`` and ``VllmEngine`` answer the same requests. Greedy, in float32, they write the same text; the
order of additions differs, so a choice between words of nearly equal probability may fall otherwise.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from PIL import Image

from vargpt_rl.model.prompt import ChatTemplate


class TextRequest(NamedTuple):
    """What a user says after the system turn, and the image shown with it, if any."""

    text: str
    image: Image.Image | None = None


class TextEngine(Protocol):
    """A language model with its chat format."""

    chat: ChatTemplate

    def write(self, requests: Sequence[TextRequest], max_tokens: int, stops: Sequence[int]) -> list[list[int]]:
        """Greedy continuation of each request: at most ``max_tokens`` ids, the last of them a stop if one came."""
        ...

    def log_probs(self, requests: Sequence[TextRequest], tokens: Sequence[int]) -> list[list[float]]:
        """Log-probability, in nats over the whole vocabulary, of each of ``tokens`` as the first of the answer."""
        ...


def answers(engine: TextEngine, requests: Sequence[TextRequest], max_tokens: int) -> list[str]:
    """The answer to each request in words."""
    written = engine.write(requests, max_tokens, [engine.chat.end])
    return [text.strip() for text in engine.chat.tokenizer.batch_decode(written, skip_special_tokens=True)]


def replies(engine: TextEngine, texts: Sequence[str], max_tokens: int) -> list[str | None]:
    """What the model itself says to a drawing request before ``image_gen_start``, word for word.

    None where it begins no image within ``max_tokens``, or puts another special token before it.
    """
    special = sorted(engine.chat.tokenizer.get_added_vocab().values())
    written = engine.write([TextRequest(text) for text in texts], max_tokens, special)
    start = engine.chat.config.image_gen_start_token_id
    decode = engine.chat.tokenizer.decode
    return [decode(ids[:-1], clean_up_tokenization_spaces=False) if ids[-1:] == [start] else None for ids in written]
