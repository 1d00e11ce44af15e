"""Scoring dense, sparse and routed models: the two tasks of the demonstration, and what runs them."""
