"""Tokenized datasets on disk: made of files of text, read by document."""

from kimijax.data.dataset.cached import dataset_of
from kimijax.data.dataset.part import Options
from kimijax.data.dataset.read import Dataset, open_dataset, split_by
from kimijax.data.dataset.tokenize import tokenize

__all__ = ["Dataset", "Options", "dataset_of", "open_dataset", "split_by", "tokenize"]
