"""Compiles functions by numba.

Compiled code is kept on disk, so that only the first process on a machine compiles it.
"""

import logging
from collections.abc import Callable
from typing import Any

from numba import njit

log = logging.getLogger(__name__)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function of numbers and arrays, which makes no arrays itself.

    The compiled function releases the GIL. It does not count references to arrays, because this
    would take most of the time of short functions. The code is kept in NUMBA_CACHE_DIR, beside the
    source, or in the user's cache folder.
    """
    try:
        return njit(nogil=True, cache=True, _nrt=False)(function)
    except RuntimeError as error:  # none of these can be written
        log.warning(
            "%s; set NUMBA_CACHE_DIR to a folder that can be written, or every start compiles anew",
            error,
        )
        return njit(nogil=True, _nrt=False)(function)
