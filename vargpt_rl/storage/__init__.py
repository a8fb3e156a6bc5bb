"""Files on disk: atomic writes, checkpoints, model directories, JSON lines."""
