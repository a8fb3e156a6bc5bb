"""The VARGPT-v1.1 model: torch and transformers only."""
