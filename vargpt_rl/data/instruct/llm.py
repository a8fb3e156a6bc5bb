"""Dialogues by a language model (VARGPT, section 4.1, Fig. 7, appendix 8): four examples, a caption, three seeds.

For each caption a prompt seed, a caption seed, an answer seed and four examples are drawn by (seed, id), and a model
behind an OpenAI-compatible endpoint writes the user's and the assistant's words. Different from the paper: seeds and
examples are fixed in ``llm.yaml``, whereas the paper had a model write the seeds and took captions of its data set as
examples; and outputs are screened (see `screening`), which the paper does not mention.

The same seed makes the same requests. The replies depend on the endpoint, which gets the seed too.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from random import Random
from typing import NamedTuple, TypeVar

import openai

from vargpt_rl.data.instruct.banks import bank
from vargpt_rl.data.instruct.dialogue import Caption, Dialogue, Unusable
from vargpt_rl.data.instruct.screening import fault, parse

SHOTS = 4
SEEDS = ("prompt_seed", "caption_seed", "answer_seed")
AHEAD = 4  # captions of each worker in progress or finished while an earlier one is awaited

Item = TypeVar("Item")
Result = TypeVar("Result")


class Endpoint(NamedTuple):
    """Address of the model. ``key`` may be empty, as for local servers; ``key_name`` is the variable it was in."""

    url: str
    model: str
    key: str
    key_name: str
    timeout_s: float
    retries: int

    def without_key(self, text: str) -> str:
        """Mask the key in a server's reply, so that it can be logged."""
        return text.replace(self.key, "***") if self.key else text


def request(caption: str, identity: str, seed: int) -> tuple[list[dict[str, str]], tuple[str, ...], int]:
    """Return the messages for a caption, the seeds in them, and a seed for the model's sampling."""
    rng = Random(f"{seed} {identity}")
    seeds = {kind: rng.choice(bank("llm")[f"{kind}s"]) for kind in SEEDS}
    messages = [{"role": "system", "content": bank("llm")["instruction"]}]
    for example in rng.sample(bank("llm")["examples"], SHOTS):
        asked = {key: example[key] for key in ("caption", *SEEDS)}
        written = {key: example[key] for key in ("prompt", "answer")}
        messages += [_message("user", asked), _message("assistant", written)]
    messages.append(_message("user", {"caption": caption} | seeds))
    return messages, (seeds["prompt_seed"], seeds["answer_seed"]), rng.getrandbits(31)


def _message(role: str, content: dict[str, str]) -> dict[str, str]:
    return {"role": role, "content": json.dumps(content, ensure_ascii=False)}


def asker(endpoint: Endpoint, seed: int) -> Callable[[Caption], Dialogue]:
    """Return a thread-safe function that asks the model for a caption's dialogue.

    It raises Unusable for a caption that fails after the client's own retries with growing pauses (429, 5xx, timeouts,
    broken connections), and ValueError if the endpoint rejects the key or does not know the model.
    """
    client = openai.OpenAI(
        base_url=endpoint.url,
        api_key=endpoint.key or "none",  # if it is empty, the client reads OPENAI_API_KEY, whatever the settings say
        timeout=endpoint.timeout_s,
        max_retries=endpoint.retries,
    )

    def ask(caption: Caption) -> Dialogue:
        messages, seeds, sampling_seed = request(caption.text, caption.id, seed)
        try:
            response = client.chat.completions.with_raw_response.create(
                model=endpoint.model, messages=messages, seed=sampling_seed
            )
        except openai.APITimeoutError as error:
            raise Unusable("timed out") from error
        except openai.APIConnectionError as error:
            raise Unusable("no connection", str(error.__cause__)) from error
        except openai.APIStatusError as error:
            raise _refused(error, endpoint) from error
        reply = _content(endpoint.without_key(response.http_response.text))
        prompt, answer = parse(reply)
        reason = fault(prompt, answer, caption.text, seeds)
        if reason:
            raise Unusable(reason, reply)
        return Dialogue(prompt, answer, {"model": endpoint.model})

    return ask


def _refused(error: openai.APIStatusError, endpoint: Endpoint) -> Exception:
    """Return the error of a status: for this caption alone, or for all (key, address, model)."""
    said = endpoint.without_key(" ".join(error.response.text.split()))
    if error.status_code in (401, 403):
        return ValueError(
            f"endpoint={endpoint.url}: answers {error.status_code} ({said[:200]}): "
            f"expected a key for it in the environment variable api_key_env={endpoint.key_name}"
        )
    if error.status_code == 404:
        return ValueError(
            f"endpoint={endpoint.url}: answers 404 ({said[:200]}): "
            f"expected an address that ends in /v1, and a model that it has, not model={endpoint.model}"
        )
    return Unusable(f"status {error.status_code}", said)


def _content(body: str) -> str:
    """Return the text of a chat completion."""
    try:
        message = json.loads(body)["choices"][0]["message"]
        content, refusal = message.get("content"), message.get("refusal")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise Unusable("answer is not a chat completion", body) from error
    if refusal:
        raise Unusable("refusal", str(refusal))
    if not isinstance(content, str) or not content.strip():
        raise Unusable("empty reply", body)
    return content


def in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """``map`` in threads, in the order of ``items``, which are consumed only as fast as results are."""
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
