"""The driver of a run: what each step of the loop does, on workers and learners."""
