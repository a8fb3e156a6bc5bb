"""Prediction of an iteration's time on machines that are not at hand, from costs that were measured."""
