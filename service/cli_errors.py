"""How every command of the project fails: one readable line on stderr, and an exit status.

0 success, 1 a failure, 2 bad input or usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from merging.errors import InputError, MergeError

FAILURE, BAD_INPUT, INTERRUPTED = 1, 2, 130


class Parser(argparse.ArgumentParser):
    """Reports wrong usage as an :class:`InputError`, like any other bad input."""

    def error(self, message: str) -> NoReturn:
        raise InputError("usage", message, remedy=f"See `{self.prog} --help`")


def run_reporting(command: Callable[[], int], *, debug: bool) -> int:
    """Run ``command`` and return its exit status; report what it raises, with ``debug`` in full."""
    try:
        status = command()
        sys.stdout.flush()
        return status
    except SystemExit as stop:  # argparse, after --help and --version
        return stop.code if isinstance(stop.code, int) else FAILURE
    except KeyboardInterrupt:
        return _complain("interrupted", "interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of stdout is gone; keep the interpreter quiet about it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _report(error)


def _report(error: Exception) -> int:
    if isinstance(error, MergeError):
        text = error.message.rstrip(".")
        text = f"{text}. {error.remedy.rstrip('.')}" if error.remedy else text
        return _complain(error.code, text, BAD_INPUT if isinstance(error, InputError) else FAILURE)
    if isinstance(error, OSError):
        return _complain("os_error", str(error), FAILURE)
    text = f"{type(error).__name__}: {error}. This is a defect; --debug shows where"
    return _complain("internal_error", text, FAILURE)


def _complain(code: str, text: str, status: int) -> int:
    sys.stderr.write(f"merganser: error: {' '.join(text.split())} [{code}]\n")
    return status
