"""Conversations: what is said is what one teacher-forced pass over the whole of it says."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image

from tests.helpers.tiny import BITS
from vargpt_rl.inference import conversation
from vargpt_rl.inference.conversation import Conversation, DrawnImage, ReplyConfig, choose_word, load
from vargpt_rl.model import generate
from vargpt_rl.model.bits import Bits
from vargpt_rl.model.generate import SamplingConfig, draw_bits, generate_images
from vargpt_rl.model.prompt import REPLY, SYSTEM
from vargpt_rl.model.scales import schedule_for, token_count
from vargpt_rl.model.unified import Drawing

SIZE = (64, 48)
SCHEDULE = schedule_for(*SIZE)
TOKENS = token_count(SCHEDULE)
RED, BLUE, WIDE = (
    Image.new("RGB", size, c) for size, c in (((56, 56), "red"), ((56, 56), "blue"), ((112, 28), "green"))
)
# Caches against one pass, fp32, at logits of a few units.
SAME = {"rtol": 0.0, "atol": 5e-5}


@pytest.fixture
def script(chat, monkeypatch):
    """Lets a test say which tokens the model chooses; returns a function that sets them, and what it was offered."""
    offered, ids = [], []

    def choose(logits_V, *rest):
        offered.append(logits_V)
        return ids.pop(0) if ids else chat.im_end

    monkeypatch.setattr(conversation, "choose_word", choose)
    return ids.extend, offered


def start(model) -> int:
    return model.config.image_gen_start_token_id


def markup(talk) -> str:
    """All that was said, with an image's tokens as one."""
    text = talk.chat.tokenizer.decode(talk.ids)
    for name in ("image_pad", "image_gen_pad"):
        text = re.sub(rf"(<\|{name}\|>)+", f"<|{name}|>", text)
    return text


@torch.no_grad()
def test_every_turn_is_that_of_one_teacher_forced_pass(model, chat, monkeypatch):
    tokens, chosen, drawn_logits = [], {}, []

    def choose(logits_V, *rest):
        chosen[len(talk.ids) - 1] = logits_V
        return tokens.pop(0)

    monkeypatch.setattr(conversation, "choose_word", choose)
    monkeypatch.setattr(generate, "draw_bits", lambda x, *rest: drawn_logits.append(x) or draw_bits(x, *rest))
    sampling = SamplingConfig(cfg=1.0, tau=0.5)
    talk = Conversation(model, chat, SIZE, sampling)

    tokens += [*chat.text("red"), chat.im_end]
    replies = [talk.say("What?", [RED, BLUE])]
    tokens += [
        *chat.text("Here is"),
        start(model),
        *chat.text("a star and"),
        start(model),
        *chat.text("one"),
        chat.im_end,
    ]
    replies.append(talk.say("Please draw two."))
    replies.append(talk.say("Recolour it.", [WIDE], draw=True))
    tokens += [start(model), *chat.text("three"), chat.im_end]
    replies.append(talk.say("How many?"))

    drawings = [part for reply in replies for part in reply if isinstance(part, DrawnImage)]
    parts = [[part if isinstance(part, str) else "#" for part in reply] for reply in replies]
    assert parts == [["red"], ["Here is", "#", "a star and", "#", "one"], [REPLY, "#"], ["#", "three"]]
    shown = "<|vision_start|><|image_pad|><|vision_end|>"
    drawn = "<|image_gen_start|><|image_gen_pad|><|image_gen_end|>"
    turns = [("user", f"{shown * 2}What?"), ("assistant", "red")]
    turns += [("user", "Please draw two."), ("assistant", f"Here is{drawn}a star and{drawn}one")]
    turns += [("user", f"{shown}Recolour it."), ("assistant", f"{REPLY}{drawn}")]
    turns += [("user", "How many?"), ("assistant", f"{drawn}three")]
    assert markup(talk) == "".join(
        f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in [("system", SYSTEM), *turns]
    )

    bits = torch.stack([drawing.bits_Ld for drawing in drawings])
    teacher = Drawing(Bits().replay(bits, SCHEDULE).inputs_BLd, SIZE)
    forced = model(torch.tensor([talk.ids]), drawing=teacher, **chat.vision_inputs([RED, BLUE, WIDE])._asdict())
    logits_NLD = torch.cat(drawn_logits, 1).unflatten(1, (len(drawings), TOKENS))[0]
    torch.testing.assert_close(logits_NLD * sampling.tau, forced.image_logits, **SAME)
    torch.testing.assert_close(model.lm_head(torch.cat(talk.reading.states, 1)), forced.logits, **SAME)
    for position, logits_V in chosen.items():
        possible = logits_V.isfinite()
        torch.testing.assert_close(logits_V[possible], forced.logits[0, position, possible], **SAME)


def test_an_asked_for_image_is_that_of_a_single_prompt(model, chat):
    for guidance in (1.0, 3.0):
        sampling = SamplingConfig(cfg=guidance, tau=1.0)
        talk = Conversation(model, chat, SIZE, sampling, seed=7)
        words, image = talk.say("a star", draw=True)
        ids = torch.tensor([chat.drawing_prompt("a star", REPLY)])
        alone = generate_images(model, ids, torch.ones_like(ids), [7], SIZE, sampling)
        assert words == REPLY
        assert torch.equal(image.bits_Ld, alone.labels_BLs[0])
        assert image.bits_Ld.shape == (TOKENS, BITS)
        assert image.image.size == SIZE[::-1]
        assert talk.ids == chat.drawn("a star", REPLY, TOKENS).ids + chat.text("\n")


def test_an_edit_is_a_turn_with_a_image(model, chat):
    sampling = SamplingConfig(tau=1.0)
    _, image = Conversation(model, chat, SIZE, sampling).say("Recolour it.", [RED], draw=True)
    shown = chat.vision_inputs([RED])
    ids = torch.tensor([chat.drawing_prompt("Recolour it.", REPLY, shown.image_grid_thw)])
    alone = generate_images(model, ids, torch.ones_like(ids), [0], SIZE, sampling, *shown)
    assert torch.equal(image.bits_Ld, alone.labels_BLs[0])
    _, other = Conversation(model, chat, SIZE, sampling).say("Recolour it.", [BLUE], draw=True)
    assert not torch.equal(image.bits_Ld, other.bits_Ld)


def test_every_image_has_a_seed_of_its_own_and_sees_what_was_said(model, chat):
    def drawings(seed, *texts):
        talk = Conversation(model, chat, SIZE, SamplingConfig(tau=1.0), seed=seed)
        return [talk.say(text, draw=True)[1] for text in texts]

    first, second = drawings(3, "a star", "a star")
    assert (first.seed, second.seed) == (3, 4)
    again = drawings(3, "a star", "a star")
    assert all(torch.equal(a.bits_Ld, b.bits_Ld) for a, b in zip((first, second), again, strict=True))
    (fresh,) = drawings(4, "a star")
    assert not torch.equal(second.bits_Ld, fresh.bits_Ld), "the same seed and words, after another turn"


def test_of_special_tokens_only_the_end_and_a_image_can_be_chosen(model, chat, script):
    write, offered = script
    talk = Conversation(model, chat, SIZE, replies=ReplyConfig(max_images=1))
    write([start(model), *chat.text("a")])
    talk.say("a star")
    special = set(chat.tokenizer.get_added_vocab().values())
    possible = [{i for i in special if logits_V[i].isfinite()} for logits_V in offered]
    assert possible == [{chat.im_end, start(model)}, {chat.im_end}, {chat.im_end}]
    assert all(offered[0][i].isfinite() for i in range(len(chat.tokenizer)) if i not in special)
    talk.say("another star")
    assert offered[-1][start(model)].isfinite(), "the next reply may have one again"


def test_replies_end_after_max_tokens_and_at_the_limit(model, chat, script):
    write, _ = script
    words = chat.text("three")
    write(words * 9)
    talk = Conversation(model, chat, SIZE, replies=ReplyConfig(max_tokens=len(words)))
    assert talk.say("How many?") == ["three"]

    talk = Conversation(model, chat, SIZE)
    talk.limit = len(chat.question("How many?")) + len(words) + len([chat.im_end, *chat.text("\n")])
    assert talk.say("How many?") == ["three"]
    assert len(talk.ids) == talk.limit
    said = list(talk.ids)
    with pytest.raises(ValueError, match="conversation is too long"):
        talk.say("And now?")
    assert talk.ids == said


def test_a_image_that_does_not_fit_is_not_begun(model, chat, script):
    _write, offered = script
    turn, closing = len(chat.question("a star")), 1 + len(chat.text("\n"))
    for spare, fits in ((0, True), (-1, False)):
        talk = Conversation(model, chat, SIZE)
        talk.limit = turn + TOKENS + 2 + closing + spare
        offered.clear()
        talk.say("a star")
        assert bool(offered[0][start(model)].isfinite()) == fits
    talk = Conversation(model, chat, SIZE)
    talk.limit = turn + TOKENS
    with pytest.raises(ValueError, match="conversation is too long"):
        talk.say("a star", draw=True)
    assert not talk.ids


def test_words_are_the_likeliest_or_sampled():
    logits = torch.tensor([0.0, 2.0, -torch.inf, 1.0])
    generator = torch.Generator().manual_seed(0)
    assert [choose_word(logits, 0.0, generator) for _ in range(5)] == [1] * 5
    drawn = torch.tensor([choose_word(logits, 2.0, generator) for _ in range(2000)])
    shares = torch.bincount(drawn, minlength=4) / 2000
    # four standard errors of 2000 draws
    torch.testing.assert_close(shares, (logits / 2).softmax(0), rtol=0, atol=0.045)
    assert shares[2] == 0


def test_sampled_replies_depend_on_the_seed(model, chat):
    def reply(seed):
        replies = ReplyConfig(temperature=1.0, max_tokens=12, max_images=0)
        return Conversation(model, chat, SIZE, replies=replies, seed=seed).say("How many?")

    assert reply(0) == reply(0) != reply(1)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"max_tokens": 0}, {"max_images": -1}])
def test_reply_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        ReplyConfig(**wrong)


def test_a_loaded_model_talks(checkpoint, model):
    loaded, chat = load(checkpoint, "cpu")
    assert not loaded.training
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    halved, chat = load(checkpoint, "cpu", "bf16")
    assert halved.dtype == torch.bfloat16
    _, image = Conversation(halved, chat, SIZE).say("a star", [RED], draw=True)
    assert image.image.size == SIZE[::-1]


def test_what_cannot_be_loaded_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="checkpoint=.*nowhere: no such directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="device=toaster: "):
        load(checkpoint, "toaster")
    with pytest.raises(ValueError, match="dtype=int8: expected one of auto"):
        load(checkpoint, "cpu", "int8")
    shutil.copytree(checkpoint, tmp_path / "other")
    (tmp_path / "other/model.safetensors").unlink()
    with pytest.raises(ValueError, match="checkpoint=.*other: .*model.safetensors"):
        load(tmp_path / "other", "cpu")


def test_a_checkpoint_without_some_of_its_tensors_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "deeper")
    settings = json.loads((folder / "config.json").read_text())
    settings["decoder_config"]["depth"] += 1
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="deeper: .* tensors are missing, among them image_decoder.blocks.2"):
        load(folder, "cpu")
