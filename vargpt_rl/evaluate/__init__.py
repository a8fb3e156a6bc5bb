"""How what the model makes is judged."""
