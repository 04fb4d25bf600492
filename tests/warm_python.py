"""A `python` that starts warm: it has a process forked that has imported everything, and stands for it.

`install` writes the program, which is `sys.executable` of all processes that `forking` starts. So what they start in
their turn (a tool its server of ranks, a benchmark a tool) imports nothing either. The program hands over its
arguments, environment, folder, open files, namespaces, CPUs and ignored signals; passes on the signals that it gets;
and ends as the forked process ends. What asks for other options of the interpreter gets the interpreter itself.

It is not for what is about the start or the end of an interpreter, its encodings, or standard files that are closed.
"""

from __future__ import annotations

import ctypes
import fcntl
import marshal
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PROGRAM = """\
#!{python} -IS
import marshal, os, signal, sys, _socket

command = sys.argv[1:]
while command[:1] == ["-u"]:
    del command[0]
if not command or (command[0].startswith("-") and command[0] not in ("-m", "-c")):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
numbers = [int(name) for name in os.listdir("/proc/self/fd")]
numbers = [number for number in numbers if number > 2 and os.path.exists(f"/proc/self/fd/{{number}}")]
kinds = "net", "mnt"
spaces = [os.open(f"/proc/self/ns/{{kind}}", os.O_RDONLY) for kind in kinds]
content = marshal.dumps(
    {{
        "command": command,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "numbers": [0, 1, 2, *numbers],
        "cpus": os.sched_getaffinity(0),
        "ignored": [int(n) for n in signal.valid_signals() if signal.getsignal(n) == signal.SIG_IGN],
    }}
)
server = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
server.connect({path!r})
for number in signal.valid_signals() - {{{passed_over}}}:
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, lambda number, frame: server.send(bytes([number])))
files = b"".join(number.to_bytes(4, sys.byteorder) for number in (*spaces, 0, 1, 2, *numbers))
server.sendmsg([len(content).to_bytes(8, "big")], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, files)])
server.sendall(content)
for number in (0, *numbers):
    os.close(number)
status = int.from_bytes(server.recv(4) or b"\\0\\0\\0\\x46", "big", signed=True)
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status not in (9, 19) else None
    os.kill(os.getpid(), -status)
os._exit(status)
"""

_PASSED_OVER = {
    *(signal.SIGKILL, signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGCONT),
    *(signal.SIGCHLD, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGPIPE, signal.SIGXFSZ),
}

_ABOVE_ALL = 500
"""A number that no file has that is handed over."""

Run = Callable[[list[str], dict[str, str]], Any]


def install(folder: Path) -> socket.socket:
    """Writes the programs `python` and `torchrun` into a folder; returns the socket that they connect to."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen(64)
    passed_over = ", ".join(str(int(number)) for number in sorted(_PASSED_OVER))
    program = folder / "python"
    program.write_text(
        _PROGRAM.format(python=sys.executable, path=str(folder / "socket"), passed_over=passed_over), encoding="utf-8"
    )
    torchrun = folder / "torchrun"
    torchrun.write_text(f'#!/bin/sh\nexec {program} {Path(__file__).parent / "forked_torchrun.py"} "$@"\n')
    for path in (program, torchrun):
        path.chmod(0o755)
    return listener


def serve(listener: socket.socket, run: Run) -> int:
    """Forks, for a program that connects, a process that waits for the one it asks for; returns its number.

    Args:
        run: gets the command and the environment in a new process, and ends it.
    """
    connection, _ = listener.accept()
    pid = os.fork()
    if pid == 0:
        try:
            listener.close()
            _supervise(connection, run)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(70)
    connection.close()
    return pid


def _supervise(connection: socket.socket, run: Run) -> None:
    header, files, _, _ = socket.recv_fds(connection, 8, 200)
    content = b""
    while len(content) < int.from_bytes(header, "big"):
        content += connection.recv(1 << 20)
    request = marshal.loads(content)
    child = os.fork()
    if child == 0:
        connection.close()
        _become(request, files, run)
    for file in files:
        os.close(file)
    ended = os.pidfd_open(child)
    while ended not in (ready := select.select([ended, connection], [], [])[0]):
        assert ready
        numbers = connection.recv(64)
        for number in numbers or [signal.SIGKILL]:  # the program has been killed
            signal.pidfd_send_signal(ended, number)
        if not numbers:
            os._exit(0)
    _, how = os.waitpid(child, 0)
    connection.sendall(os.waitstatus_to_exitcode(how).to_bytes(4, "big", signed=True))
    os._exit(0)


def _become(request: dict[str, Any], files: list[int], run: Run) -> None:
    os.setsid()
    high = [fcntl.fcntl(file, fcntl.F_DUPFD, _ABOVE_ALL) for file in files]
    os.closerange(3, _ABOVE_ALL)
    own, theirs = ("net", "mnt"), high[:2]
    for kind, file in zip(own, theirs, strict=True):
        if os.fstat(file).st_ino != os.stat(f"/proc/self/ns/{kind}").st_ino:
            assert ctypes.CDLL(None, use_errno=True).setns(file, 0) == 0, os.strerror(ctypes.get_errno())
    for file, number in zip(high[2:], request["numbers"], strict=True):
        os.dup2(file, number)
    os.closerange(_ABOVE_ALL, _ABOVE_ALL + len(files))
    os.chdir(request["folder"])
    os.sched_setaffinity(0, request["cpus"])
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    run(request["command"], request["environment"])
