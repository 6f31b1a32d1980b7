"""The roll call of a job: every process comes to process 0, and whoever is missing is named.

It is held on the port that jax will use, before jax begins. The lines on which it was held stay
open: the kernel closes those of a process that ends, however it ends.
"""

import socket
import time

from kimijax.errors import Lost, UserError

GO = "go"


class Line:
    """A connection on which lines of text are said and heard."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._reader = connection.makefile(errors="replace")

    def say(self, text: str) -> None:
        """Whoever has gone meanwhile does not hear it; that is noticed where one listens."""
        try:
            self._connection.sendall(f"{text}\n".encode())
        except OSError:
            pass

    def hear(self, seconds: float | None = None) -> str:
        """The next line; "": there is none, as the other end has gone or is silent so long."""
        try:
            self._connection.settimeout(seconds)
            return self._reader.readline(1000).strip()
        except OSError:
            return ""

    def close(self) -> None:
        """The other end hears "" from now on."""
        self._reader.close()
        self._connection.close()


def call_roll(coordinator: str, processes: int, patience: float) -> dict[int, Line]:
    """Process 0 waits for the others: a line to each. Lost, told to all: one did not come."""
    lines: dict[int, Line] = {}
    end = time.monotonic() + patience
    with _listen(coordinator, address(coordinator)[1]) as server:
        while len(lines) < processes - 1 and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                line = Line(server.accept()[0])
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
        line.say(fault or GO)
    if fault:
        for line in lines.values():
            line.close()
        raise Lost(fault)
    return lines


def answer_roll(coordinator: str, processes: int, index: int, patience: float) -> dict[int, Line]:
    """Another process tells process 0 that it is there: the line to it, once all are; or Lost."""
    end, answer = time.monotonic() + patience, ""
    while not answer and (left := end - time.monotonic()) > 0:
        try:
            line = Line(socket.create_connection(address(coordinator), left))
        except OSError:
            time.sleep(0.2)  # it is not there yet
            continue
        line.say(f"{index}/{processes}")
        # Process 0 may have come later, and its patience ends later.
        answer = line.hear(patience + 5)
        if answer != GO:
            line.close()
            time.sleep(0.2)
    if not answer:
        raise Lost(
            f"process 0 of {processes} did not answer at {coordinator} within {patience:g} s; "
            "start it there, or give the address where it is"
        )
    if answer != GO:
        raise Lost(answer)
    return {0: line}


def address(coordinator: str) -> tuple[str, int]:
    """(host, port) of host:port; UserError: it is not of that form."""
    host, _, port = coordinator.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port[:6]) < 1 << 16:
        raise UserError(f"coordinator {coordinator!r:.80}: write it as host:port, as 10.0.0.1:8476")
    return host.strip("[]"), int(port)


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


def _introduced(line: Line, processes: int) -> int | None:
    """The index of the process at the other end; None: it is none of this job."""
    known = {f"{i}/{processes}": i for i in range(1, processes)}
    return known.get(line.hear(5))
