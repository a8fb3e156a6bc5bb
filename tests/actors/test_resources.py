"""Placement: sums, shares by node, and bundles in which no two ranks share a GPU."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.config import PlacementConfig, RolloutConfig
from actors.resources import plan
from vargpt_rl.common.settings import check_ranges

COLOCATED = PlacementConfig("colocated")


@pytest.mark.parametrize(
    ("cpus", "workers", "ranks", "share", "threads"),
    [
        ([2.0], 2, 1, 0.6666, 1),
        ([16.0], 2, 2, 4.0, 8),
        ([10.0], 3, 1, 2.0, 3),
        ([1.0], 4, 0, 0.25, 1),
        ([2.0, 2.0], 2, 2, 1.0, 2),
        ([16.0, 4.0], 3, 1, 4.0, 4),  # five shares of 4
        ([1.0, 1.0, 1.0], 2, 2, 0.5, 1),  # no process spans two nodes
    ],
)
def test_without_gpus_processes_share_cpus(cpus, workers, ranks, share, threads):
    decided = plan([{"CPU": count} for count in cpus], RolloutConfig(workers=workers), ranks, "fp32")
    assert decided.worker_options == {"num_cpus": share}
    assert decided.rank_bundle == {"CPU": share}
    assert decided.bundles == [{"CPU": share}] * (workers + ranks)
    assert (decided.workers, decided.ranks, decided.threads_per_worker) == (workers, ranks, threads)
    assert not decided.use_gpu


def test_split_gives_ranks_their_own_gpus():
    rollout = RolloutConfig(workers=4, gpus_per_worker=0.5)
    decided = plan([{"CPU": 32.0, "GPU": 4.0}] * 2, rollout, 6, "fp32")
    assert decided.use_gpu
    assert decided.worker_options == {"num_cpus": 4.0, "num_gpus": 0.5}
    assert decided.rank_bundle == {"CPU": 4.0, "GPU": 1.0}
    assert decided.rank_bundles == [0, 1, 2, 3, 4, 5] and decided.worker_bundles == [6, 6, 7, 7]
    assert decided.bundles == [{"CPU": 4.0, "GPU": 1.0}] * 6 + [{"CPU": 8.0, "GPU": 1.0}] * 2


def test_colocated_puts_a_rank_and_workers_on_each_gpu():
    rollout = RolloutConfig(workers=4, gpus_per_worker=0.25)
    decided = plan([{"CPU": 24.0, "GPU": 2.0}], rollout, 2, "fp32", 0.5, COLOCATED)
    assert decided.rank_bundles == [0, 1] and decided.worker_bundles == [0, 1, 0, 1]
    assert decided.bundles == [{"CPU": 12.0, "GPU": 1.0}] * 2
    assert decided.worker_options == {"num_cpus": 4.0, "num_gpus": 0.25}
    spread = plan([{"CPU": 32.0, "GPU": 4.0}], rollout, 2, "fp32", 0.5, COLOCATED)
    assert spread.worker_bundles == [0, 1, 2, 3]  # one GPU each if there is room


@pytest.mark.parametrize("placement", [PlacementConfig(), COLOCATED])
def test_too_few_gpus_names_the_sum(placement):
    share = 0.5 if placement.is_colocated else 1.0
    with pytest.raises(ValueError, match=f"need 3 GPUs in placement={placement.kind}, but the cluster has 2"):
        ranks = 3 if placement.is_colocated else 1
        plan([{"CPU": 8.0, "GPU": 2.0}], RolloutConfig(2, share), ranks, "fp32", share, placement)


@pytest.mark.parametrize("gpus", [1, 2, 3])
def test_the_error_names_settings_that_fit(gpus):
    nodes = [{"CPU": 8.0, "GPU": float(gpus)}]
    hint = f"; placement=colocated rollout.workers={gpus} learner.ranks={gpus} fits"
    with pytest.raises(ValueError, match=hint):
        plan(nodes, RolloutConfig(), 2, "fp32")
    assert plan(nodes, RolloutConfig(gpus, 0.5), gpus, "fp32", 0.5, COLOCATED).ranks == gpus


@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(0, 8)), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([1.0, 0.5, 0.4, 0.25, 0.1]),
    st.booleans(),
)
def test_plan_fits_cluster_and_bundles(nodes, workers, ranks, share, colocated):
    resources = [{"CPU": float(cpus), **({"GPU": float(gpus)} if gpus else {})} for cpus, gpus in nodes]
    placement = COLOCATED if colocated else PlacementConfig()
    try:
        decided = plan(resources, RolloutConfig(workers, share), ranks, "fp32", 0.5 if colocated else 1.0, placement)
    except ValueError as error:
        assert "gpus_per_rank" in str(error) or "need" in str(error)
        return
    ranks_in, workers_in = Counter(decided.rank_bundles), Counter(decided.worker_bundles)
    assert max(ranks_in.values()) == 1 and (colocated or not ranks_in.keys() & workers_in.keys())
    assert sum(ranks_in.values()) == ranks and sum(workers_in.values()) == workers
    for i, bundle in enumerate(decided.bundles):
        cpus = (ranks_in[i] + workers_in[i]) * decided.worker_options["num_cpus"]
        assert bundle["CPU"] == pytest.approx(cpus, abs=1e-4) and bundle["CPU"] > 0
        if decided.use_gpu:
            taken = workers_in[i] * share + ranks_in[i] * decided.rank_bundle["GPU"]
            assert taken <= 1 + 1e-9 and bundle["GPU"] == 1
    # Bundles of one GPU, or of equal shares: filling nodes in any order finds room for all.
    largest = max(bundle["CPU"] for bundle in decided.bundles)
    room = [node.get("GPU", 0) if decided.use_gpu else int(node["CPU"] / largest + 1e-6) for node in resources]
    assert sum(room) >= len(decided.bundles)
    if decided.use_gpu:
        for node in (node for node in resources if "GPU" in node):
            assert largest * node["GPU"] <= node["CPU"] + 1e-6


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: plan([{"CPU": 8.0, "GPU": 8.0}], RolloutConfig(), 2, "fp32", 0.5), "learner.gpus_per_rank=0.5"),
        (lambda: plan([{"CPU": 8.0, "GPU": 8.0}], RolloutConfig(), 2, "fp32", 0.5, COLOCATED), "at most 1"),
    ],
)
def test_bad_settings_are_rejected(make, named):
    with pytest.raises(ValueError, match=named):
        make()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (RolloutConfig(workers=0), "workers=0"),
        (RolloutConfig(batch_size=0), "batch_size=0: expected 1 or more or auto"),
        (RolloutConfig(batch_size="most"), "batch_size=most: expected 1 or more or auto"),
        (RolloutConfig(gpus_per_worker=2), "gpus_per_worker=2: expected above 0 and at most 1"),
        (RolloutConfig(gpus_per_worker=0), "gpus_per_worker=0"),
        (RolloutConfig(reply="sing"), "reply=sing: expected one of template, generate"),
        (RolloutConfig(reply_tokens=0), "reply_tokens=0"),
        (RolloutConfig(text_engine="sglang"), "text_engine=sglang: expected one of auto, vllm, transformers"),
        (PlacementConfig("both"), "kind=both"),
        (PlacementConfig(strategy="STRICT"), "strategy=STRICT"),
    ],
)
def test_values_outside_their_range_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        check_ranges(type(settings), settings)


def test_generated_replies_use_vllm_if_installed(monkeypatch):
    def installed(there):
        monkeypatch.setattr("actors.config.find_spec", lambda name: object() if there else None)

    installed(False)
    assert not RolloutConfig(reply="generate").uses_vllm
    with pytest.raises(ValueError, match="vLLM is not installed"):
        plan([{"CPU": 2.0}], RolloutConfig(text_engine="vllm"), ranks=1, dtype="fp32")
    installed(True)
    assert RolloutConfig(reply="generate").uses_vllm and RolloutConfig(text_engine="vllm").uses_vllm
    assert not RolloutConfig().uses_vllm
    assert not RolloutConfig(reply="generate", text_engine="transformers").uses_vllm
    assert plan([{"CPU": 2.0}], RolloutConfig(), ranks=1, dtype="fp32").text is None
    assert plan([{"CPU": 2.0}], RolloutConfig(reply="generate"), ranks=1, dtype="fp32").text.worker_options == {
        "num_cpus": 0.0
    }

    config = RolloutConfig(reply="generate", workers=1, text_gpus=0.5)
    assert plan([{"CPU": 8.0, "GPU": 3.0}], config, ranks=1, dtype="fp32").text.worker_options == {
        "num_cpus": 0.0,
        "num_gpus": 0.5,
    }
    with pytest.raises(
        ValueError, match="and vLLM of 0.5 need 3 GPUs .*, but the cluster has 2; lower rollout.text_gpus"
    ):
        plan([{"CPU": 8.0, "GPU": 2.0}], config, ranks=1, dtype="fp32")
