"""Sets up gRPC channels: none of ours goes through a proxy; on the shard link a peer that is gone is noticed.

A process that ends closes its connections, which is noticed at once. A node that is cut off, or a process that is
stopped, does not answer pings: its streams end after keepalive time + timeout. Pings are answered by threads of gRPC
itself, so a process whose event loop is busy is not taken for one that is gone.
"""

from __future__ import annotations

KEEPALIVE_TIME_S = 1.0
KEEPALIVE_TIMEOUT_S = 3.0       # the processors of a busy node may be long in coming to a ping

Options = list[tuple[str, int]]

# Our own parts reach each other directly, whatever http_proxy and its kin say: those are for the world outside.
DIRECT: Options = [("grpc.enable_http_proxy", 0)]


def channel_options(keepalive_time_s: float = KEEPALIVE_TIME_S, timeout_s: float = KEEPALIVE_TIMEOUT_S) -> Options:
    """Return those of the router's channels."""
    return [
        *_common_options(keepalive_time_s, timeout_s),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 2000),        # also the time one attempt to connect may take
        ("grpc.max_reconnect_backoff_ms", 2000),
        ("grpc.use_local_subchannel_pool", 1),          # links must not share a connection, nor each other's backoff
    ]


def server_options(keepalive_time_s: float = KEEPALIVE_TIME_S, timeout_s: float = KEEPALIVE_TIMEOUT_S) -> Options:
    """Return those of the shard's server."""
    return [
        *_common_options(keepalive_time_s, timeout_s),
        ("grpc.so_reuseport", 0),                       # a port that is taken must be an error
        ("grpc.http2.min_ping_interval_without_data_ms", 100),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def _common_options(keepalive_time_s: float, timeout_s: float) -> Options:
    return [
        *DIRECT,
        ("grpc.keepalive_time_ms", round(keepalive_time_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(timeout_s * 1000)),
        # gRPC core never acts on keepalive_timeout_ms, only on this one, whose default is 60 s (grpc/grpc#39239).
        ("grpc.http2.ping_timeout_ms", round(timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # Both ends are ours, and admission bounds what a router can have open.
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
    ]
