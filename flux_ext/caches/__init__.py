"""The key-value caches of patched models."""
