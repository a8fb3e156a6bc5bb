"""Alignment of a unified visual autoregressive model."""
