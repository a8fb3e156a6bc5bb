"""Data: images, captions, records, questions and edits, and their batches."""
