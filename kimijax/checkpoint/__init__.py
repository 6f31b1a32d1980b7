"""Checkpoints: a model as two plain files, and the state of a training run that can be resumed."""

from kimijax.checkpoint.model import load_model, save_model
from kimijax.checkpoint.saver import Saver, save_state
from kimijax.checkpoint.train import Restored, restore_latest

__all__ = ["Restored", "Saver", "load_model", "restore_latest", "save_model", "save_state"]
