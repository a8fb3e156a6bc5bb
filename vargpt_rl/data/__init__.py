"""Where images, captions, questions and edits come from."""
