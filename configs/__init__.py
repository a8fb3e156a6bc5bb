"""Settings: the dataclasses of ``configs.schema`` are the truth, the YAML groups set some of their fields."""
