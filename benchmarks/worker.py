"""A side of a benchmark in a process of its own, so that ours and a peer can live in two environments.

The parent starts `python SCRIPT --serve SIDE` and sends requests; the child answers them one by one with the
functions it hands to `serve`. Both ends are ours, so requests are pickled.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class Worker:
    """A process that serves one side; `ask` sends a request and waits for the answer."""

    def __init__(self, python: str, script: str, side: str, *arguments: str):
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), environment.get("PYTHONPATH", "")])
        self.side = side
        self.process = subprocess.Popen(
            [python, script, "--serve", side, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def ask(self, task: str, **payload: Any) -> Any:
        """The answer to a task.

        Raises:
            SystemExit: if the process has ended; its own message stands on stderr.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            pickle.dump((task, payload), self.process.stdin)
            self.process.stdin.flush()
            return pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError):
            raise SystemExit(f"{self.side}: the process has ended; its message stands above") from None

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def serve(tasks: Mapping[str, Callable[..., Any]]) -> None:
    """Answer requests on standard input until it is closed."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not come between answers
    while True:
        try:
            task, payload = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(tasks[task](**payload), answers)
        answers.flush()
