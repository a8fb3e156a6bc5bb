"""Published checkpoints: tensor names and configurations of each family, and the tiny v1 model."""
