"""Warnings that point at the user's line, whatever stands between: schedulers and compilers wrap what calls us."""

from __future__ import annotations

import os
import sys
import warnings

import torch

INSIDE = tuple(os.path.dirname(file) + os.sep for file in (__file__, torch.__file__))


def warn(message: str) -> None:
    """A UserWarning at the innermost line outside of this package and torch."""
    # What warnings.warn has for this, skip_file_prefixes, is not in Python before 3.12.
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
