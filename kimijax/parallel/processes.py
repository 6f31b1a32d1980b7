"""One job of several processes: each calls `join` first, then jax shows the devices of all.

jax.distributed ends a process that waits in vain with a stack trace and without a name. So the
roll is called before it begins, on the port that it will use: whoever is missing is named.
"""

import socket
import time

import jax

from kimijax.errors import UserError

PATIENCE = 300  # seconds in which every process has to come
HEARTBEAT = 30  # seconds without a sign of life after which a process is dead, and the job with it
GO = "go"


def join(
    coordinator: str, processes: int, index: int, patience: int = PATIENCE,
    heartbeat: int = HEARTBEAT,
) -> None:
    """Come together with the other processes; before anything else is asked of jax.

    coordinator  host:port of process 0, the same for all; it must be free there
    processes    how many there are
    index        which one this is, from 0
    patience     seconds to wait for the others; UserError names one that did not come
    heartbeat    seconds after which a process that went silent ends the job, naming it
    """
    host, port = _address(coordinator)
    if not 0 <= index < processes:
        raise UserError(
            f"process {index} of {processes}: give the number of processes, and each its own index "
            "below that, from 0"
        )
    if index == 0:
        _call_roll(coordinator, port, processes, patience)
    else:
        _answer_roll(coordinator, (host, port), processes, index, patience)
    jax.distributed.initialize(
        coordinator, processes, index, initialization_timeout=patience,
        heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=heartbeat,
    )


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port[:6]) < 1 << 16:
        raise UserError(f"coordinator {coordinator!r:.80}: write it as host:port, as 10.0.0.1:8476")
    return host.strip("[]"), int(port)


def _call_roll(coordinator: str, port: int, processes: int, patience: float) -> None:
    """Process 0 waits for the others, and tells those that came whether all did."""
    lines: dict[int, socket.socket] = {}
    end = time.monotonic() + patience
    try:
        with _listen(coordinator, port) as server:
            while len(lines) < processes - 1 and (left := end - time.monotonic()) > 0:
                server.settimeout(left)
                try:
                    line, _ = server.accept()
                except TimeoutError:
                    break
                if (index := _introduced(line, processes)) is None:
                    line.close()  # nobody of this job
                    continue
                if index in lines:
                    lines[index].close()  # it was started again
                lines[index] = line
        missing = [i for i in range(1, processes) if i not in lines]
        fault = missing and (
            f"process {', '.join(map(str, missing[:8]))} of {processes} did not come to "
            f"{coordinator} within {patience:g} s; start it with this coordinator, or run fewer"
        )
        for line in lines.values():
            _tell(line, fault or GO)
    finally:
        for line in lines.values():
            line.close()
    if fault:
        raise UserError(fault)


def _listen(coordinator: str, port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise UserError(
            f"coordinator {coordinator}: process 0 cannot listen there: {error.strerror}; choose "
            "another port"
        ) from error


def _introduced(line: socket.socket, processes: int) -> int | None:
    """The index of the process at the other end; None: it is none of this job."""
    line.settimeout(5)
    try:
        words = line.makefile().readline(64).split()
    except (OSError, UnicodeDecodeError):
        return None
    known = {f"{i}/{processes}": i for i in range(1, processes)}
    return known.get(words[0]) if len(words) == 1 else None


def _tell(line: socket.socket, text: str) -> None:
    try:
        line.sendall(f"{text}\n".encode())
    except OSError:
        pass  # it has gone meanwhile: jax will wait for it, and say so


def _answer_roll(
    coordinator: str, address: tuple[str, int], processes: int, index: int, patience: float
) -> None:
    """Another process tells process 0 that it is there, and hears whether all are."""
    end, answer = time.monotonic() + patience, ""
    while not answer and (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection(address, left) as line:
                line.sendall(f"{index}/{processes}\n".encode())
                # Process 0 may have come later, and its patience ends later.
                line.settimeout(patience + 5)
                answer = line.makefile().readline(1000).strip()
        except (OSError, UnicodeDecodeError):
            pass  # it is not there yet, or something else is
        if not answer:
            time.sleep(0.2)
    if not answer:
        raise UserError(
            f"process 0 of {processes} did not answer at {coordinator} within {patience:g} s; "
            "start it there, or give the address where it is"
        )
    if answer != GO:
        raise UserError(answer)
