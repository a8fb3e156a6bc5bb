"""Captions to drawing dialogues for instruction tuning: ``python -m vargpt_rl.data.instruct``, see `__main__`."""
