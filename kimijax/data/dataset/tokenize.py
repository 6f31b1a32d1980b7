"""Files of text made a dataset, by several processes, resumed where a killed run stopped.

Beside the dataset lies, until it is finished, NAME.partial: plan.json says what is made, and every
part of the inputs that is done has a file. Parts do not depend on the number of processes.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

from kimijax.data.codecs import BytesCodec
from kimijax.data.dataset.assemble import assemble
from kimijax.data.dataset.format import Info
from kimijax.data.dataset.part import Options, encode_part, load_part, save_part
from kimijax.data.documents.inputs import Input, Part, deal, find_inputs
from kimijax.data.foreign import read_object, writing
from kimijax.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_digest
from kimijax.errors import UserError

PLAN = "plan.json"
Progress = Callable[[int, int, int, bool], None]  # bytes and tokens done, bytes in all, whether new


def tokenize(
    inputs: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    tokenizer: str | os.PathLike | None = None,
    jobs: int = 1,
    options: Options | None = None,
    on_part: Progress = lambda *_: None,
) -> Info:
    """Write the dataset `out` of the documents in files; what an earlier run began is gone on with.

    tokenizer  a model directory, None: bytes
    UserError: a document is faulty, nothing is there, `out` exists, or what lies half done is of
    another tokenizer, other inputs or options.
    """
    out, options = Path(out), options or Options()
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: must be at least 1")
    if os.path.lexists(out):
        raise UserError(f"{out}: exists already; remove it or name another --out")
    codec, found = _tokenizer(tokenizer), find_inputs(inputs)
    digest = tokenizer_digest(tokenizer)
    parts = deal(found)
    work = out.with_name(f"{out.name}.partial")
    with _claimed(work, plan_of(found, digest, options)):
        files = [work / f"{part.number:06d}.npz" for part in parts]
        made = list(zip(parts, files, strict=True))
        _encode_missing(made, tokenizer, codec, jobs, options, on_part)
        shutil.rmtree(work / "dataset", ignore_errors=True)  # of a run killed while it wrote
        name = "bytes" if tokenizer is None else Path(tokenizer).resolve().name
        with writing(work):
            info = assemble(work / "dataset", made, codec, name, digest)
            (work / "dataset").rename(out)
            shutil.rmtree(work)
    return info


def plan_of(inputs: Sequence[Input], digest: str, options: Options) -> dict:
    """What decides a dataset, as JSON values; files are told by name, size and time of change."""
    listed = json.dumps([[x.source, x.name, x.size, x.changed] for x in inputs])
    return {
        "tokenizer": digest,
        "inputs": hashlib.blake2b(listed.encode(), digest_size=16).hexdigest(),
        "options": asdict(options),
    }


def _tokenizer(directory: str | os.PathLike | None) -> Tokenizer:
    return Tokenizer(BytesCodec()) if directory is None else load_tokenizer(directory)


@contextlib.contextmanager
def _claimed(work: Path, plan: dict) -> Iterator[None]:
    """The half-done dataset of a plan, for this process alone."""
    with writing(work):
        work.mkdir(parents=True, exist_ok=True)
        handle = os.open(work, os.O_RDONLY)
    try:
        try:
            flock(handle, LOCK_EX | LOCK_NB)
        except OSError as error:
            raise UserError(f"{work}: another process is at work in it; wait for it") from error
        _check_plan(work, plan)
        yield
    finally:
        os.close(handle)


def _check_plan(work: Path, plan: dict) -> None:
    """Note what is made in `work`; UserError: what is done there is of something else."""
    began = read_object(work / PLAN)
    # What was done without leaving a line out is right when some are.
    before = {**plan, "options": plan["options"] | {"bad_lines": "fail"}}
    if any(work.glob("*.npz")) and began not in (plan, before):
        wrong = [name for name in plan if began.get(name) != plan[name]]
        raise UserError(
            f"{work}: was begun with another tokenizer, other inputs or other options "
            f"(different: {', '.join(wrong)}); give the same again, or remove it"
        )
    with writing(work):
        temporary = work / f"{PLAN}.tmp"
        temporary.write_text(json.dumps(plan, indent=1))
        temporary.replace(work / PLAN)


def _encode_missing(
    files: Sequence[tuple[Part, Path]], tokenizer: str | os.PathLike | None, codec: Tokenizer,
    jobs: int, options: Options, on_part: Progress,
) -> None:
    """Encode the parts that have no file yet."""
    total = sum(part.bytes for part, _ in files)
    todo = [(part, path) for part, path in files if not path.exists()]
    for part, path in files:
        if path.exists():
            on_part(part.bytes, int(load_part(path, "lengths")[0].sum()), total, False)
    if jobs == 1:
        _start(codec, options)
        for part, path in todo:
            on_part(*_work(part, path), total, True)
        return
    pool = ProcessPoolExecutor(
        min(jobs, max(1, len(todo))), multiprocessing.get_context("spawn"), _start_worker,
        (tokenizer, options),
    )
    try:
        futures = _submit(pool, todo)
        for future in as_completed(futures):
            on_part(*future.result(), total, True)
    except BrokenProcessPool as error:
        raise UserError("a worker process was killed, perhaps for want of memory: give fewer "
                        "--jobs; the same command goes on") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, todo: Sequence[tuple[Part, Path]]) -> list[Future]:
    """Begin; workers are started here and inherit that Ctrl-C waits until they are ready for it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return [pool.submit(_work, part, path) for part, path in todo]
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


_worker: list = []  # tokenizer and options of this process


def _start(tokenizer: Tokenizer, options: Options) -> None:
    # A process for every core: threads of the library would only wait for one another.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker[:] = tokenizer, options


def _start_worker(tokenizer: str | os.PathLike | None, options: Options) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends workers without a traceback
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _start(_tokenizer(tokenizer), options)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(part: Part, path: Path) -> tuple[int, int]:
    """Encode a part into its file; its bytes on disk and its tokens."""
    encoded = encode_part(part, *_worker)
    save_part(path, encoded)
    return part.bytes, len(encoded.tokens)
