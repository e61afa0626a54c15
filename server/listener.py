"""Where the server listens, and how many connections the machine lets it hold."""

import errno
import logging
import resource
import socket

from server.errors import ConfigError, StartupError

log = logging.getLogger("heddle")
RESERVED_FILES = 128  # for all but connections in use: libraries, pipes, and connections that are on their way out
ACCEPTED_AT_ONCE = 8  # connections that asyncio accepts before it looks at any of them
BACKLOG = 1024  # connections that the kernel keeps until they are accepted
WANTED_FILES = 65_536


def bind(host: str, port: int) -> socket.socket:
    """A socket that accepts nothing yet. Raises ConfigError for what is no address, StartupError for one in use."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise ConfigError(f"{host!r} is no address to listen on ({error.strerror})") from None
    # asyncio turns Nagle's algorithm off only where the protocol says TCP: a token would else wait for the last one's
    # acknowledgement, which clients delay by 40 ms
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        kind = ConfigError if error.errno in (errno.EACCES, errno.EPERM) else StartupError
        raise kind(f"cannot listen on {host}:{port} ({error.strerror})") from None
    return listener


def url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def room_for_connections(wanted: int) -> int:
    """Raise the limit of open files as far as it goes; returns how many connections fit below it, at most `wanted`.

    At the limit itself accepting fails again and again, and the event loop does nothing else. Raises ConfigError where
    there would be no room at all.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < WANTED_FILES:
        soft = WANTED_FILES if hard == resource.RLIM_INFINITY else min(WANTED_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return wanted
    room = soft - RESERVED_FILES
    if room < 1:
        raise ConfigError(f"this process may open {soft} files; Heddle needs more than {RESERVED_FILES} (ulimit -n)")
    if room < wanted:
        log.warning("%d connections at once instead of %d: this process may open %d files", room, wanted, soft)
    return min(room, wanted)
