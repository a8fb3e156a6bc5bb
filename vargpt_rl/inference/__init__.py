"""A model in use: conversations, answers, images."""
