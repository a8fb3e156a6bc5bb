"""The iterated SFT/DPO loop (VARGPT-v1.1, section 3.2, Fig. 6): ``python -m vargpt_rl.loop [key=value ...]``.

Every step is recorded when it is done; the same command resumes after the last one. Exit codes: 0 done, 1 failed, 2 a
setting or an input is wrong (no worker was started), 75 stopped by SIGTERM or SIGUSR2 (EX_TEMPFAIL: try again).
"""

import os
import sys

USAGE = """\
usage: python -m vargpt_rl.loop [key=value ...]

Aligns a model by iterated SFT and preference training. The same command resumes an interrupted run.

examples:
  python -m vargpt_rl.loop                                       the demo: every stage of the embedded model
  python -m vargpt_rl.loop name=first iterations=1 'resolutions=[128]'
                                                                 a shorter run, in runs/first
  python -m vargpt_rl.loop 'align.methods=[dpo,grpo]' reward.path=rewards.shapes:shapes_reward
                                                                 GRPO after DPO, with a reward
  python -m vargpt_rl.loop checkpoint=FOLDER experiment=NAME     your model, with settings of configs/experiment/

Keys, their defaults and explanations: configs/schema.py. Results: runs/NAME/summary.json and runs/NAME/model.
Exit codes: 0 done, 1 failed, 2 a setting or an input is wrong, 75 stopped by a signal (the same command resumes).
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the loop; return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return 0
    # Seconds of imports, which the usage does not need.
    from vargpt_rl.common.logs import configure_logging
    from vargpt_rl.driver.loop import start

    configure_logging()
    try:
        return start(arguments)
    except SystemExit:  # raised by ``actors.cluster.stop``; within a call of Ray its status is lost
        return os.EX_TEMPFAIL


if __name__ == "__main__":
    sys.exit(main())
