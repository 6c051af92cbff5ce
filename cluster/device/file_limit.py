"""Says how many files and connections this process may have open, and what admission may promise with that."""

from __future__ import annotations

import resource

from serving.config import AdmissionConfig

ENOUGH_FILES = 1 << 20  # with far more, programs that walk over all possible files take long
MANY_CONNECTIONS = 8192     # most of them idle; one takes some 15 kB
RESERVED_FILES = 256    # of a process's limit: libraries, logs, sockets of Ray and of the shard links


def raise_file_limit() -> int:
    """Raise the soft limit as far as the hard one, and the system, let. Returns the limit then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, ENOUGH_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (ValueError, OSError):       # some systems have a lower limit than the hard one says
            return soft
        return wanted
    return ENOUGH_FILES if soft == resource.RLIM_INFINITY else soft


def max_http_connections(admission: AdmissionConfig, max_files: int) -> int:
    """Return how many connections a router's HTTP door may have, with or without a request: enough for all that are
    admitted or wait, and no more than leave files for the gRPC door and for the answer to one too many."""
    wanted = max(MANY_CONNECTIONS, 4 * (admission.max_open_requests + admission.max_queued_requests))
    return max(2, min(wanted, (max_files - RESERVED_FILES) // 2))


def bounded_by_files(admission: AdmissionConfig, max_files: int, num_routers: int) -> AdmissionConfig:
    """Return the admission under which every request that is admitted or refused has a connection of its own.

    All requests may come through one HTTP proxy: its files are shared by `num_routers`. Those over the bound get their
    answer (429) at once and make room; without it they would wait, unseen, for a connection to be accepted.
    """
    room = max(2, (max_files - RESERVED_FILES) // 2 // num_routers)
    if admission.max_open_requests + admission.max_queued_requests <= room:
        return admission
    num_open = min(admission.max_open_requests, room // 2)
    return admission.model_copy(update={"max_open_requests": num_open,
                                        "max_queued_requests": min(admission.max_queued_requests, room - num_open)})
