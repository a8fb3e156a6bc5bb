"""Memory estimates: model states by ZeRO stage, counted activations, and rejecting runs that do not fit."""

import copy

import pytest
import torch

from actors.config import PlacementConfig, RolloutConfig
from configs.load import load_config
from learners.config import LearnerConfig
from tests.helpers.tiny import tiny_config, tiny_tokenizer
from vargpt_rl.losses.supervised import sft_loss
from vargpt_rl.memory import plan as memory
from vargpt_rl.memory import tracker
from vargpt_rl.memory.fit import Devices, check_fits, fullest, largest_batch
from vargpt_rl.memory.inputs import TEXT_TOKENS, batch, preference_loss
from vargpt_rl.memory.rollout import rollout
from vargpt_rl.memory.tracker import counting, meta_model
from vargpt_rl.memory.training import activations, parameter_sizes, states
from vargpt_rl.memory.units import GIB, RUNTIME
from vargpt_rl.model.generate import SamplingConfig
from vargpt_rl.model.modeling import Vargpt
from vargpt_rl.model.scales import scale_index, schedule_for
from vargpt_rl.stages import STAGES, freeze

SETTINGS = ["resolutions=[32,48]", "data.seen_side=56", "align.methods=[dpo]"]
ALL = "stages=[pretrain,understanding,align,edit]"
SAMPLING = SamplingConfig(cfg=3.0)


@pytest.fixture(scope="module")
def config():
    config = tiny_config(tiny_tokenizer())
    config.text_config.num_hidden_layers, config.decoder_config.depth = 6, 7
    config.text_config.layer_types = ["full_attention"] * 6
    return config


@pytest.fixture(scope="module")
def model(config):
    torch.manual_seed(0)
    return Vargpt(config)


def sft(rows: int, resolution: int = 32):
    stage = STAGES["sft"]
    return lambda model: sft_loss(model, batch(model, rows, rows, resolution), stage.noise, stage.text_weight)[0]


def dpo(rows: int, resolution: int = 32):
    return lambda model: preference_loss(model, batch(model, rows, rows, resolution), resolution)


def questions(model: Vargpt) -> torch.Tensor:
    stage = STAGES["understanding"]
    return sft_loss(model, batch(model, 3, 1, 32, seen_side=56), stage.noise, stage.text_weight)[0]


# States


def test_states_follow_from_the_parameters(model):
    freeze(model, STAGES["sft"])
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = states(parameter_sizes(model, STAGES["sft"]), torch.float32, 0, 1, False, True)
    assert 0 < trained < total
    assert found["weights"] == found["whole"] == 4 * total
    assert found["gradients"] == 4 * trained and found["optimizer"] == 8 * trained and found["buffers"] == 0


def test_bf16_keeps_fp32_masters(model):
    sizes = parameter_sizes(model, STAGES["dpo"])
    trained = sum(n for n, is_trained in sizes if is_trained)
    found = states(sizes, torch.bfloat16, 2, 1, False, True)
    assert found["weights"] == 2 * sum(n for n, _ in sizes)
    assert found["gradients"] == 2 * trained and found["optimizer"] == 12 * trained
    assert found["update"] == 6 * trained


def test_zero_partitions_by_stage():
    sizes = [(8_000_000, True), (80_000_000, False)]
    one = {zero: states(sizes, torch.bfloat16, zero, 1, False, True) for zero in (1, 2, 3)}
    eight = {zero: states(sizes, torch.bfloat16, zero, 8, False, True) for zero in (1, 2, 3)}
    for zero, shared in {
        1: ["optimizer"],
        2: ["optimizer", "gradients"],
        3: ["optimizer", "gradients", "weights"],
    }.items():
        for name in ("optimizer", "gradients", "weights"):
            share = 8 if name in shared else 1
            assert eight[zero][name] * share == one[zero][name], (zero, name)
    assert eight[3]["whole"] == one[3]["whole"] == 2 * 88_000_000


def test_gpu_allocates_whole_buckets_and_cpu_only_used_ones():
    sizes = [(1000, True)]
    on_gpu, on_cpu = (states(sizes, torch.float32, 2, 1, True, where) for where in (True, False))
    assert on_gpu["buffers"] == 4 * (5 * 10**8 + 1000 + 1000)
    assert on_cpu["buffers"] == 4 * 3 * 1000


def test_8_bit_moments_take_a_quarter():
    sizes = [(1_000_000, True), (9_000_000, False)]
    found = {
        name: states(sizes, torch.bfloat16, 2, 1, accumulates=True, on_gpu=True, optimizer=name)["optimizer"]
        for name in ("adamw", "adamw_8bit", "paged_adamw_8bit")
    }
    assert found["adamw"] == 12_000_000 and found["paged_adamw_8bit"] == found["adamw_8bit"]
    assert 6_000_000 < found["adamw_8bit"] < 6_100_000


@pytest.mark.parametrize("zero", [2, 3])
def test_offloaded_states_leave_the_gpu_and_not_the_machine(zero):
    sizes = [(6_000_000, True), (2_000_000, True), (9_000_000, False)]
    kept, offloaded, on_cpu = (
        states(sizes, torch.bfloat16, zero, 1, accumulates=True, on_gpu=on_gpu, offload=offload)
        for on_gpu, offload in ((True, False), (True, True), (False, True))
    )
    assert offloaded["gradients"] == offloaded["optimizer"] == offloaded["update"] == 0
    assert offloaded["weights"] == kept["weights"]
    saved = 8_000_000 * 2 if zero == 2 else 0  # the last micro-batch's gradients
    assert offloaded["buffers"] == kept["buffers"] - saved + 6_000_000 * 2
    assert on_cpu == states(sizes, torch.bfloat16, zero, 1, accumulates=True, on_gpu=False)


# Activations


def edits(model: Vargpt) -> torch.Tensor:
    stage = STAGES["edit"]
    return sft_loss(model, batch(model, 2, 2, 32, seen_side=56, edits=True), stage.noise, stage.text_weight)[0]


@pytest.mark.parametrize("checkpointing", [0, 1])
@pytest.mark.parametrize(
    ("stage", "loss"), [("sft", sft(2)), ("dpo", dpo(2)), ("understanding", questions), ("edit", edits)]
)
def test_four_blocks_count_for_all(config, stage, loss, checkpointing, monkeypatch):
    short = activations(meta_model(config, torch.float32), STAGES[stage], loss, checkpointing)
    monkeypatch.setattr(tracker, "BLOCKS", 100)
    assert short == pytest.approx(
        activations(meta_model(config, torch.float32), STAGES[stage], loss, checkpointing), 0.01
    )


def test_four_blocks_count_for_all_in_sampling(config, monkeypatch):
    short = rollout(meta_model(config, torch.float32), 0, 64, 2, SAMPLING)
    monkeypatch.setattr(tracker, "BLOCKS", 100)
    assert short == rollout(meta_model(config, torch.float32), 0, 64, 2, SAMPLING)


def test_meta_model_keeps_what_the_real_model_keeps(config, model):
    """Saved tensors of a real forward pass, without the model's own."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    freeze(model.train(), STAGES["sft"])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        real = sft(2)(model)
    small = meta_model(config, torch.float32)
    freeze(small.model.train(), STAGES["sft"])
    with counting(small) as counted:
        shape = sft(2)(small.model)
    assert real.shape == shape.shape
    assert counted.live == pytest.approx(sum(storage.nbytes() for storage in kept.values()), 0.05)


def test_cached_tables_stay_apart(config):
    """One made outside has no values, which control flow inside needs; one made inside is on the CPU."""
    schedule = schedule_for(32)
    assert scale_index(schedule, tracker.META).is_meta
    small = meta_model(config, torch.float32)
    with counting(small):
        assert scale_index(schedule, tracker.META).tolist() == [0, 1, 1, 1, 1]
    assert scale_index(schedule, tracker.META).is_meta
    with pytest.raises(KeyError), counting(small):
        scale_index(schedule, tracker.META)
        raise KeyError
    assert scale_index(schedule, tracker.META).is_meta


def test_activations_depend_on_rows_resolution_checkpointing(config):
    small, stage = meta_model(config, torch.float32), STAGES["sft"]
    base = activations(small, stage, sft(2), 0)
    assert activations(small, stage, sft(4), 0) == pytest.approx(2 * base, 0.1)
    assert activations(small, stage, sft(2, 64), 0) > 1.1 * base
    assert activations(small, stage, sft(2), 1) < 0.6 * base
    assert activations(small, stage, sft(2), 1) < activations(small, stage, sft(2), 2) < base
    assert activations(meta_model(config, torch.bfloat16), stage, sft(2), 0) < 0.9 * base


def test_caches_cover_all_blocks_and_both_branches(config):
    rows, tokens, text = 2, 1 + 4 + 16, TEXT_TOKENS
    found = rollout(meta_model(config, torch.float32), 123, 64, rows, SAMPLING)
    language = 2 * 6 * (64 // 2) * (text + tokens) * rows
    decoder = 2 * 7 * 64 * (text + tokens) * 2 * rows
    assert 4 * (language + decoder) < found.caches < 1.2 * 4 * (language + decoder)
    assert found.total == RUNTIME + 123 + found.caches + found.activations


def test_a_recorded_batch_keeps_its_memory(config):
    meta = meta_model(config, torch.float32)
    plain = rollout(meta, 0, 64, 2, SAMPLING)
    recorded = rollout(meta, 0, 64, 2, SAMPLING, keeps_graphs=True)
    # The first pass of a process makes tables of positions too.
    assert recorded.caches == pytest.approx(plain.caches, rel=0.01)
    assert plain.total < recorded.total <= 2 * plain.total


def test_edits_count_the_images_shown(config):
    small, stage = meta_model(config, torch.float32), STAGES["edit"]
    plain = activations(small, stage, lambda model: sft_loss(model, batch(model, 2, 2, 32), stage.noise, 1.0)[0], 0)
    assert activations(small, stage, edits, 0) > plain
    inputs = batch(small.model, 2, 2, 32, seen_side=56, edits=True)
    assert (inputs["input_ids"] == config.image_token_id).sum() == 2 * 4 and len(inputs["image_grid_thw"]) == 2
    prompt = (inputs["input_ids"] != config.image_gen_pad_token_id).int().argmin(1)
    assert prompt.tolist() == [TEXT_TOKENS + 4] * 2, "the image is added to the text"
    sampling = [rollout(small, 0, 32, 2, SAMPLING, side) for side in (0, 224)]
    assert sampling[1].caches > sampling[0].caches, "64 tokens more in each row's cache"


# A run


def test_plan_covers_every_stage_and_adds_up(config):
    plan = memory.plan(load_config([*SETTINGS, ALL]), config, on_gpu=True, compare=True)
    names = [(need.stage, need.resolution) for need in plan.training]
    rounds = [(name, px) for px in (32, 48) for name in ("sft", "dpo")]
    assert names == [("pretrain", 32), ("understanding", 32), *rounds, ("edit", 48)]
    assert [need.resolution for need in plan.rollouts] == [32, 48]
    for need in plan.training:
        assert need.total == RUNTIME + need.weights + need.gradients + need.optimizer + need.buffers + need.activations
        assert need.otherwise < need.activations
        assert f"{need.total / GIB:.1f} GiB (weights" in str(need)


@pytest.mark.parametrize(
    ("block", "more"), [("dpo", []), ("rl", ["align.methods=[rft]", "reward.path=rewards.technical:sharpness"])]
)
def test_plan_counts_less_for_frozen_language_inputs(config, block, more):
    activations = {}
    for frozen in ("", "language_inputs"):
        settings = load_config([*SETTINGS, ALL, *more, f"{block}.frozen=[{frozen}]"])
        plan = memory.plan(settings, config, on_gpu=True)
        activations[frozen] = [need.activations for need in plan.training if need.stage == block]
    pairs = zip(activations["language_inputs"], activations[""], strict=True)
    assert all(less < 0.9 * whole for less, whole in pairs)


@pytest.mark.parametrize(
    ("block", "more"),
    [("dpo", []), ("rl", ["align.methods=[rft]", "reward.path=rewards.technical:sharpness", "rl.credit_scales=null"])],
)
def test_plan_has_no_language_model_where_states_are_stored(config, block, more):
    found = {}
    for stored in ("false", "true"):
        given = [*SETTINGS, *more, f"{block}.frozen=[language_inputs]", f"{block}.stored_states={stored}"]
        plan = memory.plan(load_config(given), config, on_gpu=True)
        found[stored] = next(need for need in plan.training if need.stage == block)
    less, whole = found["true"], found["false"]
    language = sum(p.numel() for n, p in Vargpt(config).named_parameters() if n.startswith(("model.", "lm_head.")))
    assert whole.weights - less.weights == whole.whole - less.whole == language * 4
    assert less.activations < whole.activations and less.optimizer == whole.optimizer


def test_an_adapter_has_states_for_its_own_tensors_alone(config):
    lora = ["adapter=lora", "adapter.rank=2", "adapter.serving=merged", "adapter.reference=learner"]
    plans = [
        memory.plan(load_config([*SETTINGS, "stages=[align]", *more]), config, on_gpu=on_gpu)
        for more, on_gpu in (([], True), (lora, True), (lora, False))
    ]
    for whole, adapted in zip(plans[0].training, plans[1].training, strict=True):
        assert adapted.optimizer < whole.optimizer / 3 and adapted.gradients < whole.gradients / 3
        assert whole.weights < adapted.weights < 1.2 * whole.weights
        assert adapted.activations > 0
    assert plans[1].rollouts[0].weights == plans[1].training[0].whole
    assert plans[2].rollouts[0].weights > 1.2 * plans[2].training[0].whole, "originals of merged layers"
    settings = load_config([*SETTINGS, "stages=[align]", *lora])
    for need, limit in zip(plans[1].training, memory.bound(settings, config, on_gpu=True).training, strict=True):
        assert need.total <= limit.total


def test_an_average_takes_fp32_of_what_trains(config):
    given = [*SETTINGS, "stages=[align]", "adapter=lora", "learner.ranks=1"]
    plans = [memory.plan(load_config([*given, *more]), config, on_gpu=True) for more in ([], ["sft.recipe.ema=0.9"])]
    for plain, averaged in zip(plans[0].training, plans[1].training, strict=True):
        wanted = plain.gradients if plain.stage == "sft" else 0
        assert averaged.buffers - plain.buffers == wanted


def test_bound_is_no_less_than_plan(config):
    settings = load_config([*SETTINGS, ALL, "edit.recipe.micro_batch=8"])
    bound, plan = memory.bound(settings, config, False), memory.plan(settings, config, False)
    for upper, need in zip(bound.training, plan.training, strict=True):
        assert upper.total >= need.total, need.stage
    assert max(need.total for need in bound.rollouts) >= max(need.total for need in plan.rollouts)


def test_each_of_two_losses_has_a_gradient_sum(config):
    def buffers(*settings: str) -> int:
        plan = memory.plan(load_config([*SETTINGS, "stages=[understanding]", *settings]), config, on_gpu=False)
        return plan.training[0].buffers

    trained = sum(
        n for n, is_trained in parameter_sizes(memory._on_meta(config), STAGES["understanding"]) if is_trained
    )
    assert buffers() - buffers("understanding.drawing_share=0") == 2 * 4 * trained // 2
    assert buffers("understanding.recipe.zero=3") == buffers(
        "understanding.recipe.zero=3", "understanding.drawing_share=0"
    )


def test_rejects_runs_that_do_not_fit_with_the_sum(config):
    settings = load_config([*SETTINGS, "rollout.workers=3"])
    check_fits(settings, config, Devices(0, 0, 20 * GIB))
    with pytest.raises(ValueError) as error:
        check_fits(settings, config, Devices(0, 0, 4 * GIB))
    message = str(error.value)
    assert "3 rollout workers of 1." in message and "2 learner ranks of 1." in message and "runtime 1.0" in message
    assert "which has 4.0 GiB" in message and "gradient_checkpointing=1" in message and "\n" not in message


def test_the_largest_batch_is_bounded_by_memory(config):
    settings = load_config([*SETTINGS, "rollout.batch_size=auto", "rollout.workers=1", "learner.ranks=1"])
    need = {size: fullest_at(settings.with_batch_size(32, size), config) for size in (1, 8, 32)}
    assert need[1] < need[8] < need[32]
    for room, size in ((need[32], 32), (need[32] - 1, 8), (need[1], 1)):
        assert largest_batch(settings, config, Devices(0, 0, room), 32, (1, 8, 32)) == size


def fullest_at(settings, config) -> int:
    there = settings.at_resolution(32)
    return fullest(memory.plan(there, config, False), there.rollout, there.learner, there.placement, False).total


def test_processes_share_a_gpu_by_their_shares(config):
    plan = memory.plan(load_config(["resolutions=[32]", "stages=[align]", "iterations=1"]), config, on_gpu=True)

    def crowd(workers: float, ranks: float, kind: str = "colocated") -> tuple[int, int]:
        workers_config = RolloutConfig(2, gpus_per_worker=workers)
        learner = LearnerConfig(2, gpus_per_rank=ranks)
        load = fullest(plan, workers_config, learner, PlacementConfig(kind), on_gpu=True)
        assert load.total == load.workers * load.rollout.total + load.ranks * load.training.total
        return load.workers, load.ranks

    assert crowd(1.0, 1.0, "split") == (0, 1)  # the buckets make a rank larger than a worker
    assert crowd(0.5, 1.0, "split") == (0, 1)  # two workers share a GPU, none with a rank
    assert crowd(0.5, 0.5) == (1, 1)
    assert crowd(0.3, 0.7) == (1, 1)
    assert crowd(0.1, 0.5) == (2, 1)  # there are no more than two
    with pytest.raises(ValueError, match="gpus_per_rank=0.7 beside rollout.gpus_per_worker=0.5"):
        crowd(0.5, 0.7)


def test_planning_does_not_change_the_configuration(config):
    before = copy.deepcopy(config.to_dict())
    meta_model(config, torch.float32)
    assert config.to_dict() == before


# Streams of records


def test_streamed_records_need_long_rows_and_a_tokenizer(config):
    given = ["data=records", "+data.sources.a.files=[x]", "stages=[pretrain,understanding]", "data.seen_pixels=3136"]
    plans = []
    for more in (["data.max_tokens=200"], ["data.max_tokens=600"], ["data.max_tokens=600", "data.encoded=x"]):
        settings = load_config([*given, "resolutions=[48]", *more])
        plans.append({need.stage: need for need in memory.plan(settings, config, False).training})
    short, long, encoded = plans
    assert long["understanding"].activations > 2 * short["understanding"].activations
    assert long["pretrain"].activations == short["pretrain"].activations, "image rows are not padded to questions"
    tokenizer = sum(p.numel() for p in Vargpt(config).image_tokenizer.parameters()) * 4
    for stage in ("pretrain", "understanding"):
        assert long[stage].weights - encoded[stage].weights == tokenizer
        assert long[stage].activations >= encoded[stage].activations
    settings = load_config([*given, "resolutions=[48]", "data.max_tokens=600"])
    whole = memory.bound(settings, config, False)
    for name, need in long.items():
        assert next(n for n in whole.training if n.stage == name).total >= need.total


def test_online_methods_are_planned_with_the_scales_they_train(config):
    online = ["stages=[align]", *SETTINGS, "reward.path=rewards.shapes:shapes_reward", "align.methods=[grpo]"]

    def planned(*settings: str) -> dict[tuple[str, int], int]:
        found = memory.plan(load_config([*online, *settings]), config, on_gpu=False)
        return {(each.stage, each.resolution): each.activations for each in found.training}

    whole, coarse = planned(), planned("rl.credit_scales=1")
    assert list(whole) == [("sft", 32), ("rl", 32), ("sft", 48), ("rl", 48)], "no dpo"
    assert all(coarse["rl", side] < whole["rl", side] for side in (32, 48))
    assert coarse["sft", 32] == whole["sft", 32]
