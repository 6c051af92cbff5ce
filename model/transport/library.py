"""Loads the compiled transport. Built by setup.py from transport.c."""

from __future__ import annotations

import ctypes
import platform
from ctypes import POINTER, c_char_p, c_int, c_int64, c_long, c_uint64, c_void_p
from pathlib import Path

from model.errors import ModelError

_BUILD = "build it here: python setup.py build_generated"
_FUNCTIONS = {      # result, arguments: as in transport.c and heartbeats.h
    "transport_new": (c_void_p, [c_long]),
    "transport_bell": (c_int, [c_void_p]),
    "transport_segment_bytes": (c_long, []),
    "transport_add": (c_int, [c_void_p, c_char_p, c_int, c_int, c_int, c_int]),
    "transport_is_connected": (c_int, [c_void_p, c_char_p]),
    "transport_open": (c_int, [c_void_p, c_uint64, c_int, c_int, c_char_p, POINTER(c_int)]),
    "transport_exchange": (c_int, [c_void_p, c_uint64, c_void_p, c_void_p, c_void_p, c_void_p, c_long, c_int, c_long,
                                   POINTER(c_int)]),
    "transport_lost": (c_int, [c_void_p, c_uint64]),
    "transport_abort": (None, [c_void_p, c_uint64]),
    "transport_leave": (c_int, [c_void_p, c_uint64]),
    "transport_flush": (c_int, [c_void_p, c_int]),
    "transport_close": (None, [c_void_p]),
    "transport_forget": (None, [c_void_p]),
    "siphash": (c_uint64, [c_char_p, c_char_p, c_uint64]),
    "heartbeats_new": (c_void_p, [c_int, c_int, c_char_p, c_char_p, c_long, c_long]),
    "heartbeats_watch": (c_int, [c_void_p, c_int, c_void_p]),
    "heartbeats_silence_ns": (c_int64, [c_void_p, c_char_p]),
    "heartbeats_close": (None, [c_void_p]),
}


class TransportLibraryError(ModelError, OSError):
    """There is no compiled transport for this machine, or it does not load."""


def library_path() -> Path:
    return Path(__file__).with_name(f"transport.{platform.machine()}.so")


def load_library() -> ctypes.CDLL:
    """Return the functions; they release the GIL while they run."""
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise TransportLibraryError(f"{path} does not load: {error}", fix=_BUILD) from error
    try:
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise TransportLibraryError(f"{path} was built from other sources: {error}", fix=_BUILD) from error
    return library
