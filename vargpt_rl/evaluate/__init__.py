"""Evaluation of models.

``python -m vargpt_rl.evaluate`` runs benchmarks on checkpoints. The driver scores and plots a run's held-out prompts
with `held_out` and `grid`.
"""
