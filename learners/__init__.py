"""Learners: DeepSpeed groups that train the model, supervised and by preference."""
