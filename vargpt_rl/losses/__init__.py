"""Losses: pure functions of model outputs."""
