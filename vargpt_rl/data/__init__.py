"""Where pictures, captions, questions and edits come from."""
