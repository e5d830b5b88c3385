"""Python children without the seconds that torch takes to import: forked from a process that has imported it alone.

A child has arguments, environment, folder and files of its own, as one that ``subprocess`` starts, and none of the
suite's modules, threads or patches. What is read while torch is loaded (OMP_*, LD_PRELOAD) does not reach it.
"""

from __future__ import annotations

import functools
import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

LONGEST = 1 << 17  # bytes of what a child is told


def run(
    command: Sequence[object],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    input: bytes = b"",
    **rest: object,
) -> subprocess.CompletedProcess:
    """Stand in for ``subprocess.run`` of ``[sys.executable, ...]`` with "-c", "-m" or a script; captures all output."""
    first, *words = map(str, command)
    assert first == sys.executable
    told = {"words": words, "env": dict(os.environ if env is None else env), "cwd": str(cwd or Path.cwd())}
    files = [os.memfd_create(name) for name in ("stdin", "stdout", "stderr")]
    try:
        os.pwrite(files[0], input, 0)
        line, _ = _server(os.getpid())
        socket.send_fds(line, [json.dumps({**told, "parent": os.getpid()}).encode()], files)
        status = int(line.recv(16))
        out, err = (os.pread(file, os.fstat(file).st_size, 0) for file in files[1:])
    finally:
        for file in files:
            os.close(file)
    text = rest.get("text")
    return subprocess.CompletedProcess(command, status, *((x.decode() if text else x) for x in (out, err)))


@functools.cache
def _server(ours: int) -> tuple[socket.socket, subprocess.Popen]:
    """Start the process to fork from; it ends with ours, when the socket does."""
    line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, __file__, str(theirs.fileno())]
    quiet = {"stdin": subprocess.DEVNULL, "start_new_session": True}  # an interrupt is the suite's
    server = subprocess.Popen(command, pass_fds=[theirs.fileno()], **quiet)
    theirs.close()
    line.settimeout(300)
    return line, server


def next_child(line: socket.socket) -> dict:
    """Fork for each message and answer with the child's status; in a child, return what it was told."""
    while True:
        message, files, *_ = socket.recv_fds(line, LONGEST, 3)
        if not message:
            sys.exit()
        pid = os.fork()
        if pid == 0:
            line.close()
            for number, file in enumerate(files):
                os.dup2(file, number)
        for file in files:
            os.close(file)
        if pid == 0:
            return json.loads(message)
        line.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def become(words: list[str], env: dict[str, str], cwd: str, parent: int) -> None:
    """Run a command in this process, as its own main module."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    os.getppid = lambda: parent  # who asked for the child
    script = words[0] not in ("-c", "-m")
    sys.path[0] = str(Path(words[0]).parent) if script else cwd
    sys.argv[:] = words if script else [words[0], *words[2:]]
    if script:
        runpy.run_path(words[0], run_name="__main__")
    elif words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    import torch  # noqa: F401

    become(**next_child(socket.socket(fileno=int(sys.argv[1]))))
