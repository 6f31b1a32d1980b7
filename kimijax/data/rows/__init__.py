"""Rows of tokens to train on, found by index: packed documents, chats, tasks, and mixtures."""

from kimijax.data.rows.batch import Batch, batches, mixture
from kimijax.data.rows.chats import Chats, read_chats
from kimijax.data.rows.packed import packed_rows
from kimijax.data.rows.tasks import CopyTask, KeyTask, VariableTask, score, task_rows

__all__ = [
    "Batch", "Chats", "CopyTask", "KeyTask", "VariableTask", "batches", "mixture", "packed_rows",
    "read_chats", "score", "task_rows",
]
