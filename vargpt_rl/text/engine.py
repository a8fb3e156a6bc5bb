"""Interface of the text engines: requests to a language model, and answers made from its tokens.

``TransformersEngine`` and ``VllmEngine`` are interchangeable. Greedy, in float32, they write the same text; the order
of additions differs, so tokens of nearly equal probability may be chosen differently.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from PIL import Image

from vargpt_rl.model.prompt import ChatTemplate


class TextRequest(NamedTuple):
    """A user's turn: the text and the images shown before it."""

    text: str
    images: Sequence[Image.Image] = ()


class TextEngine(Protocol):
    """A language model with its chat format."""

    @property
    def chat(self) -> ChatTemplate: ...

    def write(self, requests: Sequence[TextRequest], max_tokens: int, stops: Sequence[int]) -> list[list[int]]:
        """Continue each request greedily: at most ``max_tokens`` ids, ending with a stop token if one came."""
        ...

    def log_probs(self, requests: Sequence[TextRequest], tokens: Sequence[int]) -> list[list[float]]:
        """Return log p, in nats over the whole vocabulary, of each of ``tokens`` as the answer's first token."""
        ...


def answers(engine: TextEngine, requests: Sequence[TextRequest], max_tokens: int) -> list[str]:
    """Answer each request in words."""
    written = engine.write(requests, max_tokens, [engine.chat.end])
    return [text.strip() for text in engine.chat.tokenizer.batch_decode(written, skip_special_tokens=True)]


def replies(engine: TextEngine, texts: Sequence[str], max_tokens: int) -> list[str | None]:
    """Return the model's own words before ``image_gen_start`` in reply to each drawing request.

    None if it starts no image within ``max_tokens``, or writes another special token first.
    """
    special = sorted(engine.chat.tokenizer.get_added_vocab().values())
    written = engine.write([TextRequest(text) for text in texts], max_tokens, special)
    start = engine.chat.config.image_gen_start_token_id
    decode = engine.chat.tokenizer.decode
    return [decode(ids[:-1], clean_up_tokenization_spaces=False) if ids[-1:] == [start] else None for ids in written]
