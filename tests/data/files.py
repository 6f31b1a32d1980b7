"""Files of documents, written for a test."""

import gzip
import json


def write(path, content):
    """A file with bytes, text, or JSON lines of a list; compressed where its name ends in .gz."""
    if isinstance(content, list):
        content = "".join(json.dumps(x) + "\n" for x in content)
    content = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def texts(rng, count, longest=400):
    """`count` texts of words, some of characters that take several bytes."""
    words = ["the", "fox", "jumps", "12345", "长上下文", "naïve", "\n", "a  b"]
    return [" ".join(rng.choice(words, rng.integers(1, longest))) for _ in range(count)]


def contents(directory):
    """Every file below a directory: name -> bytes."""
    return {str(p.relative_to(directory)): p.read_bytes()
            for p in sorted(directory.rglob("*")) if p.is_file()}
