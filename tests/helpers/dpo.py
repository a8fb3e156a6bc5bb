"""Arguments of DPO trainers in tests."""

from pathlib import Path
from typing import Any

from trl import DPOConfig


def cpu_dpo_config(folder: Path, **settings: Any) -> DPOConfig:
    """TRL's arguments as the learner sets them, in fp32 on the CPU."""
    return DPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        precompute_ref_log_probs=True,
        max_length=None,
        report_to="none",
        remove_unused_columns=False,
        gradient_checkpointing=False,
        bf16=False,
        **settings,
    )
