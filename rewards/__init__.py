"""Pluggable rewards and preference builders.

A reward is a callable ``(images: list[PIL.Image], prompts: list[str]) -> list[float | None]``; None is not scored.
"""
