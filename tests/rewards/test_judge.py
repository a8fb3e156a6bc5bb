"""The judge on a Qwen2-VL checkpoint that knows the shapes world, by both engines, against a plain forward pass."""

import sys

import pytest
import ray
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from configs.load import load_config
from rewards.combined import WeightedSum, scorers
from rewards.judge import QUESTION, VlmJudge
from rewards.testing import check_reward
from tests.helpers.vllm import needs_vllm
from vargpt_rl.data.sources import ShapesConfig, ShapesSource
from vargpt_rl.driver.inputs import gather
from vargpt_rl.model.hub import EMBEDDED
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.prompt import ChatFormat

SIDE = 112
ASKED = ("is there {prompt}?", "is there a red circle?")
WORDS = {"questions": list(ASKED), "yes": "yes", "no": "no"}
THINGS = ["a red circle", "a blue square", "a green triangle", "a yellow cross"]


@pytest.fixture(scope="module")
def whole():
    return Vargpt.from_pretrained(EMBEDDED, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def folder(whole, tmp_path_factory):
    """The embedded model's language half as a checkpoint of type qwen2_vl."""
    folder = tmp_path_factory.mktemp("judge")
    settings = {key: value for key, value in whole.config.to_dict().items() if key in ("text_config", "vision_config")}
    tokens = {key: value for key, value in whole.config.to_dict().items() if key.endswith("token_id")}
    config = Qwen2VLConfig(**settings, **tokens, tie_word_embeddings=False)
    model = Qwen2VLForConditionalGeneration(config)
    model.load_state_dict({name: tensor for name, tensor in whole.state_dict().items() if name in model.state_dict()})
    model.save_pretrained(folder)
    chat = ChatFormat(str(EMBEDDED), whole.config)
    chat.tokenizer.save_pretrained(folder)
    chat.image_processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def shown():
    """Six images for each thing: three that show it and three that show the next."""
    source = ShapesSource(ShapesConfig())
    pairs = [(thing, THINGS[(i + step) % len(THINGS)]) for i, thing in enumerate(THINGS) for step in (0, 1)]
    images = [source.load(f"clean/{seed}/{other}", SIDE) for _, other in pairs for seed in range(3)]
    return images, [thing for thing, _ in pairs for _ in range(3)]


@pytest.fixture(scope="module")
def expected(whole, shown):
    """By a forward pass of each image alone: the share of "yes" in "yes" and "no", mean of the two questions."""
    chat = ChatFormat(str(EMBEDDED), whole.config)
    yes, no = chat.text("yes")[0], chat.text("no")[0]
    scores = []
    for image, prompt in zip(*shown, strict=True):
        seen, shares = chat.vision_inputs([image]), []
        for question in ASKED:
            ids = torch.tensor([chat.question(question.replace("{prompt}", prompt), seen.image_grid_thw)])
            with torch.no_grad():
                p = whole(ids, **seen._asdict()).logits[0, -1].double().softmax(-1)
            shares.append(float(p[yes] / (p[yes] + p[no])))
        scores.append(sum(shares) / 2)
    return scores


def test_transformers_is_the_plain_forward_pass(folder, shown, expected):
    for model in (folder, str(EMBEDDED)):
        judge = VlmJudge(model, **WORDS, engine="transformers", device="cpu")
        assert judge(*shown) == pytest.approx(expected, abs=1e-5)  # fp32 in a batch and alone
    assert judge([], []) == []


def test_it_can_tell_what_is_there(expected):
    """The mean over images that show the prompt, and over those that show something else."""
    rows = torch.tensor(expected).view(len(THINGS), 2, 3).mean((0, 2))
    assert rows[0] > rows[1] + 0.1


@needs_vllm
def test_vllm_equals_transformers(folder, shown, expected):
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        term = {"path": "rewards.judge:VlmJudge", "timeout_s": 600.0, "options": {"model": folder, **WORDS}}
        with scorers(WeightedSum({"judge": term | {"python": sys.executable}})) as live:
            values = live(*shown)
            assert values == pytest.approx(expected, abs=1e-5), live.report()
    finally:
        ray.shutdown()


def test_only_the_prompt_placeholder_is_replaced(folder, shown):
    judge = VlmJudge(folder, ["{prompt}? {x}", "{prompt}? {x}"], "yes", "no", "transformers")
    said = judge(shown[0][:2], ["{a}", "{prompt}"])
    once = VlmJudge(folder, ["{prompt}? {x}"], "yes", "no", "transformers")
    assert said == pytest.approx(once(shown[0][:2], ["{a}", "{prompt}"]), abs=1e-6)  # batches of another size
    assert said[0] != said[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"questions": []}, r"questions=\[\]: expected a list"),
        ({"questions": QUESTION}, "questions='Does this.*expected a list"),
        ({"engine": "tensorrt"}, "engine=tensorrt: expected auto, vllm or transformers"),
        ({"engine": "vllm", "device": "cpu"}, "engine=vllm"),
        ({"device": "tpu9"}, "device=tpu9"),
        ({"dtype": "int4"}, "dtype=int4"),
        ({"model": "/nowhere"}, "/nowhere/config.json: no such file"),
    ],
)
def test_bad_settings_are_rejected_before_loading(folder, options, said):
    with pytest.raises(ValueError, match=said):
        VlmJudge(**{"model": folder, **options})


def test_other_models_and_long_answers_are_rejected(folder, shown, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="expected a model of type qwen2_vl or vargpt, got 'llama'"):
        VlmJudge(str(tmp_path))
    with pytest.raises(ValueError, match="'Yes': expected a single token, got 2 tokens"):
        VlmJudge(folder, engine="transformers")(*shown)


def test_the_judge_keeps_the_contract(folder, tmp_path):
    check_reward("rewards.judge:VlmJudge", model=folder, engine="transformers", **WORDS)
    settings = ["reward.path=rewards.judge:VlmJudge", f"+reward.options.model={folder}", f"runs={tmp_path}"]
    assert gather(load_config(settings)).reward.questions == (QUESTION,)
    with pytest.raises(ValueError, match="no such file"):
        gather(load_config([*settings[:1], "+reward.options.model=/nowhere"]))
