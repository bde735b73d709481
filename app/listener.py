"""The listening TCP socket of the API: opening it, and ceasing to accept from it without losing a connection.

Linux drops a connection whose peer acknowledges no sent data for `UNTAKEN_S` seconds; other systems may keep it.
"""

import ctypes
import os
import socket
import struct
import sys
from contextlib import suppress

from app.errors import SettingsError

BACKLOG = 1024
HAND_OVER_S = 30.0  # how long requests may go on in a process that hands over, before it is stopped as any other
UNTAKEN_S = 30  # how long sent bytes may stay unacknowledged, or the peer's window closed
_SO_ATTACH_FILTER = 26
_TCP_INFO_UNACKED = 24  # the offset of a field of tcp_info; of a listening socket, the length of the accept queue


def listening_socket(host: str, port: int) -> socket.socket:
    """Open a TCP socket that listens on the host and port. Raises `SettingsError` if the system does not allow it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Set before `listen`, because a connection inherits the options that are set when it is made.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if sys.platform == "linux":
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNTAKEN_S * 1000)
            listener.bind(address)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise SettingsError("PROFILES_PORT", f"cannot serve on {host}:{port}: {error.strerror or error}") from None
    return listener


def drop_new_connections(listener: socket.socket) -> bool:
    """Drop packets to the listening socket, in every process that shares it, but not packets to accepted connections.
    Return False if the system does not support this; only Linux does."""
    if sys.platform != "linux":
        return False
    drop = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # one instruction of BPF: return 0 bytes
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(drop)))
    except OSError:
        return False
    return True


def stop_accepting(listener: socket.socket) -> None:
    """Cease to accept connections in this process; other processes that share the socket go on. Linux only.

    granian owns descriptors of the socket and cannot give them up without ending its connections. So each descriptor of
    the socket is replaced by a socket to which no client connects.
    """
    if sys.platform != "linux":
        return
    shared = os.fstat(listener.fileno())
    with socket.socket(socket.AF_UNIX) as idle:
        idle.setblocking(False)
        idle.bind("")  # a name that the kernel chooses
        idle.listen()
        for descriptor in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208
            with suppress(OSError):  # the descriptor of the listing itself is closed
                if os.path.samestat(os.fstat(descriptor), shared):
                    os.dup2(idle.fileno(), descriptor, inheritable=False)


def accept_queue_length(listener: socket.socket) -> int:
    """The number of connections in the accept queue; 0 on systems other than Linux."""
    if sys.platform != "linux":
        return 0
    found = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_UNACKED + 4)
    (waiting,) = struct.unpack_from("I", found, _TCP_INFO_UNACKED)
    return int(waiting)
