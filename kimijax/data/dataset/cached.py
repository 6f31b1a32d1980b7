"""A dataset of whatever files a user names: the one they are, or one tokenized on first use."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from kimijax.data.dataset.format import INFO
from kimijax.data.dataset.part import Options
from kimijax.data.dataset.read import Dataset, open_dataset
from kimijax.data.dataset.tokenize import Progress, plan_of, tokenize
from kimijax.data.documents.inputs import find_inputs
from kimijax.data.tokenizer import tokenizer_digest
from kimijax.errors import UserError


def cache_root() -> Path:
    """$XDG_CACHE_HOME/kimijax/datasets, by default ~/.cache/kimijax/datasets."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kimijax/datasets"


def dataset_of(
    paths: Sequence[str | os.PathLike],
    tokenizer: str | os.PathLike | None = None,
    jobs: int = 1,
    options: Options | None = None,
    on_part: Progress = lambda *_: None,
) -> Dataset:
    """The dataset in a directory, or that of files of text, JSONL and Parquet.

    Files are tokenized into NAME-DIGEST below `cache_root`, where they are found the next time; the
    digest is of the tokenizer, the options and each file's name, size and time of change.
    tokenizer  a model directory, None: bytes. UserError: a dataset was made with another one.
    """
    if not paths:
        raise UserError("no text is named: give a dataset, or files or directories of text")
    first, digest = Path(paths[0]), tokenizer_digest(tokenizer)
    if len(paths) == 1 and (first / INFO).exists():
        dataset = open_dataset(first)
        if dataset.info.digest != digest:
            raise UserError(
                f"{first}: was made with the tokenizer {dataset.info.tokenizer!r:.80}, not with "
                f"{tokenizer or 'bytes'}; name that one, or tokenize the text anew"
            )
        return dataset
    options = options or Options()
    plan = json.dumps(plan_of(find_inputs(paths), digest, options), sort_keys=True)
    name = hashlib.blake2b(plan.encode(), digest_size=10).hexdigest()
    out = cache_root() / f"{first.resolve().name}-{name}"
    if not out.exists():
        tokenize(paths, out, tokenizer, jobs, options, on_part)
    return open_dataset(out)
