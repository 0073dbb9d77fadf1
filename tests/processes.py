"""Other programs that tests run, each with a time limit: after it, the program and all that it has started end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def run_python(*arguments: object, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """`python arguments` in the project's folder, with one thread."""
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=REPOSITORY, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException as error:
        output = end(process)
        if isinstance(error, subprocess.TimeoutExpired):
            raise AssertionError(f"{process.args} took over {timeout} s; its output: {output}") from error
        raise  # Ctrl-C
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def launch(processes: int, *arguments: object, **options) -> subprocess.CompletedProcess:
    """The same by PyTorch's own launcher, as several processes."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes)
    return run_python(*launcher, *arguments, USE_LIBUV="0", **options)


def end(process: subprocess.Popen) -> object:
    """The launcher's processes have groups of their own, which it ends, in 30 s or less, when it is told to end."""
    for name, seconds in (("SIGTERM", 40), ("SIGKILL", 5)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, getattr(signal, name)) if hasattr(os, "killpg") else process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=seconds)
    return None
