"""A transformers model and what a patch changes in it."""
