"""Start of a run: settings and inputs checked, workers and learner ranks placed and started."""

import logging
import os
from pathlib import Path

import ray
import yaml
from omegaconf import OmegaConf

from actors.cluster import nodes, own_gpus, reserve
from actors.pool import RolloutPool
from actors.resources import Placement, plan
from actors.text_engine import start_text_engine
from configs.consistency import check_devices
from configs.load import RESUME, load_config
from configs.schema import LoopConfig
from learners.group import LearnerGroup
from vargpt_rl.common.memory import available_memory
from vargpt_rl.driver.inputs import Inputs, gather, is_judged_by_its_reward
from vargpt_rl.driver.plan import planned_steps
from vargpt_rl.driver.run import STATE, SUMMARY, Run
from vargpt_rl.driver.session import Session
from vargpt_rl.driver.settled import batch_limits, record_dtype, settled_batch_size, settled_dtype
from vargpt_rl.driver.state import BEGUN_IN, read_state
from vargpt_rl.driver.verify import check_steps
from vargpt_rl.driver.weights import WeightSync
from vargpt_rl.memory.fit import Devices, check_fits, gpu_memory
from vargpt_rl.memory.plan import model_config
from vargpt_rl.model.hub import TINY_V1
from vargpt_rl.page.contents import DEFAULTS
from vargpt_rl.storage.adapter import write_fresh_adapter
from vargpt_rl.storage.checkpoint import Policy
from vargpt_rl.storage.files import write_atomically
from vargpt_rl.storage.lock import lock_folder

logger = logging.getLogger(__name__)


def prepare(arguments: list[str], lock: bool = True) -> tuple[LoopConfig, Inputs, Run]:
    """Return the settings, all that they name, and the run's directory, locked. ValueError if any is wrong.

    A program that only looks at the run, or starts it elsewhere, needs no ``lock``.
    """
    config = load_config(arguments)
    if any(argument.startswith(f"{RESUME}=") for argument in arguments):
        enter_beginning(config)
    if lock and not (config.directory / SUMMARY).exists():
        check_machine(config)
    held = lock_folder(config.directory) if lock else None  # before anything is written there
    return config, gather(config), Run(config.directory, plain(config), held)


def enter_beginning(config: LoopConfig) -> None:
    """Change to the directory where a run was begun, if it is still there: relative paths in settings start from it."""
    path = config.directory / STATE
    begun = Path(read_state(path)[0].get(BEGUN_IN, "")) if path.exists() else Path()
    if begun.is_dir() and not begun.samefile("."):
        config.runs = str(Path(config.runs).resolve())
        os.chdir(begun)
        logger.info("relative paths in the settings start from %s, where the run was begun", begun)


def check_machine(config: LoopConfig) -> None:
    """ValueError for settings that need GPUs where it is certain, before Ray starts, that the run will have none."""
    gpus = own_gpus()
    if gpus is not None:
        check_devices(config, on_gpu=gpus > 0)


def write_defaults(run: Run) -> None:
    """Write the default settings beside a new run's own, for its page to tell what differs."""
    path = run.directory / DEFAULTS
    if not path.exists():
        write_atomically(path, yaml.safe_dump(plain(load_config([])), sort_keys=False).encode())


def plain(config: LoopConfig) -> dict:
    """Return settings as plain values, as they are written down."""
    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)


def resume(run: Run) -> None:
    """Verify the files of a run that was begun before, and note after which step it resumes."""
    check_steps(run)
    if run.state["steps"]:
        run.note(f"resuming after {list(run.state['steps'])[-1]}")


def place(config: LoopConfig, inputs: Inputs, run: Run) -> Placement:
    """Place workers and ranks in the cluster. ValueError if the run will not fit."""
    learner = config.learner
    found = devices()
    dtype = settled_dtype(config, run, on_gpu=found.gpus > 0)
    placement = plan(
        nodes(),
        config.rollout,
        learner.ranks,
        dtype=dtype,
        gpus_per_rank=learner.gpus_per_rank,
        placement=config.placement,
    )
    settled = config.with_dtype(dtype)
    check_devices(settled, placement.use_gpu)
    check_fits(settled, model_config(inputs.model), found)
    return placement


def devices() -> Devices:
    """Return the cluster's GPUs, with the memory of the first that Ray gives, and the memory of all machines."""
    found = ray.cluster_resources()
    gpus = int(found.get("GPU", 0))
    each = ray.get(ray.remote(num_gpus=1)(gpu_memory).remote()) if gpus else 0
    memory = int(found["memory"] + found["object_store_memory"])
    if len(nodes()) == 1:  # which may be in a container that has less than its machine
        memory = min(memory, available_memory())
    return Devices(gpus, each, memory)


def open_session(config: LoopConfig, inputs: Inputs, run: Run, placement: Placement) -> Session:
    """Start workers, learner ranks and the text engine side by side; settle what is auto.

    RuntimeError if the cluster has no room in time.
    """
    if is_judged_by_its_reward(config):
        logger.warning(
            "held-out images are scored by the same reward that trains; evaluation.reward.path=... names another"
        )
    run.progress.plan(planned_steps(config), run.state["steps"])
    record_dtype(config, run, placement)
    run.progress.say(f"starting {len(placement.worker_bundles)} workers and {config.learner.ranks} learner ranks")
    settled = config.with_dtype("bf16" if placement.bf16 else "fp32")
    limits = batch_limits(settled, run, inputs.model, devices)  # before GPUs are reserved
    worker_places, rank_places = reserve(placement, config.learner.start_timeout_s)
    part = run.progress.part
    adapter = config.adapter if config.adapter.is_on else None
    pool = RolloutPool(
        config.rollout,
        placement,
        inputs.model,
        inputs.source,
        places=worker_places,
        adapter=adapter,
        progress=part,
        note=run.note,
        wait=False,
    )
    learners = LearnerGroup(
        config.learner,
        placement.rank_bundle,
        placement.threads_per_worker,
        placement.use_gpu,
        placement.bf16,
        places=rank_places,
        note=run.note,
    )
    text = start_text_engine(
        config.rollout, placement, inputs.model, inputs.source, progress=part, note=run.note, adapter=adapter
    )
    pool.wait_until_ready()
    config = settled_batch_size(config, run, pool, limits)
    weights = WeightSync(pool, text, run)
    return Session(config=config, inputs=inputs, run=run, pool=pool, text=text, weights=weights, learners=learners)


def base_name(session: Session) -> str:
    """Return the name by which others find the model that a run started from: its hub name, else its directory."""
    given = session.config.checkpoint
    is_made = given == TINY_V1 or Path(given).is_dir()
    return session.inputs.model if is_made else given


def starting_policy(session: Session) -> Policy:
    """Return the policy that a run starts from: the model, with an adapter that has no effect yet, if it trains one.

    The adapter's first weights are a set of their own, so that workers can go back to them.
    """
    config, model = session.config, session.inputs.model
    if not config.adapter.is_on:
        return Policy(model)
    weights = session.run.directory / "checkpoints" / "adapter" / "final"
    dtype = session.learners.dtype
    session.run.step("adapter", lambda: write_fresh_adapter(model, config.adapter, weights, config.seed, dtype))
    return Policy(model, (weights,), config.adapter)
