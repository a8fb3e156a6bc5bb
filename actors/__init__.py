"""Rollout workers: Ray actors that hold the whole model, draw, score, judge, answer, and take new weights in place."""
