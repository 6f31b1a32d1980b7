"""Experiments: each file holds its question, its command, its cost and its answer."""
