"""Runs `moesaic` in this process: one of its own spends half a second of a core on imports, seconds with Ray or torch.

For commands that do not fork: `up` and `demo` do. An error that `main` does not show as a message is raised here.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import sys
import warnings
from subprocess import CompletedProcess
from unittest import mock

from cluster.cli.main import main


def moesaic_here(*arguments: str) -> CompletedProcess[str]:
    """Return its exit code and what it printed. This process keeps its environment and its limit of files."""
    stdout, stderr, exit_code = io.StringIO(), io.StringIO(), 0
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        with (mock.patch.object(sys, "argv", ["moesaic", *arguments]), mock.patch.dict(os.environ),
              contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), warnings.catch_warnings()):
            warnings.simplefilter("ignore")         # Ray's own, at import
            main()
    except SystemExit as end:
        exit_code = int(end.code or 0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    return CompletedProcess(arguments, exit_code, stdout.getvalue(), stderr.getvalue())
