import pytest

from actors.resources import RolloutConfig, plan


@pytest.mark.parametrize(
    "resources, workers, ranks, share, threads",
    [
        ({"CPU": 2.0}, 2, 1, 0.6666, 1),
        ({"CPU": 16.0}, 2, 2, 4.0, 8),
        ({"CPU": 10.0}, 3, 1, 2.0, 3),
        ({"CPU": 1.0}, 4, 0, 0.25, 1),
    ],
)
def test_without_gpus_all_share_the_cpus(resources, workers, ranks, share, threads):
    decided = plan(resources, RolloutConfig(workers=workers), ranks)
    assert decided.worker_options == {"num_cpus": share}
    assert decided.rank_bundle == {"CPU": share}
    assert (decided.workers, decided.ranks, decided.threads_per_worker) == (workers, ranks, threads)
    assert not decided.use_gpu


def test_with_gpus_each_process_gets_its_own():
    rollout = RolloutConfig(workers=4, gpus_per_worker=0.5)
    decided = plan({"CPU": 64.0, "GPU": 8.0}, rollout, ranks=6)
    assert decided.use_gpu
    assert decided.worker_options == {"num_cpus": 6.0, "num_gpus": 0.5}
    assert decided.rank_bundle == {"CPU": 6.0, "GPU": 1.0}


def test_too_few_gpus_says_both_sums():
    with pytest.raises(ValueError, match="need 3 GPUs, but the cluster has 2"):
        plan({"CPU": 8.0, "GPU": 2.0}, RolloutConfig(workers=2), ranks=1)


def test_generated_replies_ask_for_vllm_where_it_is(monkeypatch):
    def installed(there):
        monkeypatch.setattr("actors.resources.find_spec", lambda name: object() if there else None)

    installed(False)
    assert not RolloutConfig(reply="generate").uses_vllm
    with pytest.raises(ValueError, match="vLLM is not installed"):
        plan({"CPU": 2.0}, RolloutConfig(text_engine="vllm"), ranks=1)
    installed(True)
    assert RolloutConfig(reply="generate").uses_vllm and RolloutConfig(text_engine="vllm").uses_vllm
    assert not RolloutConfig().uses_vllm
    assert not RolloutConfig(reply="generate", text_engine="transformers").uses_vllm
    assert plan({"CPU": 2.0}, RolloutConfig(), ranks=1).text is None
    assert plan({"CPU": 2.0}, RolloutConfig(reply="generate"), ranks=1).text.worker_options == {"num_cpus": 0.0}

    config = RolloutConfig(reply="generate", workers=1, text_gpus=0.5)
    assert plan({"CPU": 8.0, "GPU": 3.0}, config, ranks=1).text.worker_options == {"num_cpus": 0.0, "num_gpus": 0.5}
    with pytest.raises(ValueError, match="and vLLM of 0.5 need 2.5 GPUs, but the cluster has 2; .*rollout.text_gpus"):
        plan({"CPU": 8.0, "GPU": 2.0}, config, ranks=1)


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="rollout.workers=0"):
        RolloutConfig(workers=0)
    with pytest.raises(ValueError, match="rollout.batch_size=0"):
        RolloutConfig(batch_size=0)
    with pytest.raises(ValueError, match="rollout.reply=sing: expected template or generate"):
        RolloutConfig(reply="sing")
    with pytest.raises(ValueError, match="rollout.reply_tokens=0"):
        RolloutConfig(reply_tokens=0)
    with pytest.raises(ValueError, match="rollout.text_engine=sglang: expected auto, vllm or transformers"):
        RolloutConfig(text_engine="sglang")
