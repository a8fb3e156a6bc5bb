"""Predict the time of an iteration on machines that are not available, from measured costs."""
