"""Sweeps over small models, each with its question and its answer."""
