"""Small parts that every room uses; nothing here imports from the project."""
