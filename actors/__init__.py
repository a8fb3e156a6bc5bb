"""Rollout workers: Ray actors with the whole model that sample, score, judge and answer, and load weights in place."""
