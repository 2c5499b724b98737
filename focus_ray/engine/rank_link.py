"""Sockets between rank 0 and the other ranks.

Each rank has two: one brings it the plans of steps, the other tells whether it lives. Plain bytes
are exchanged until both sides know that they belong together; then Python objects.
"""

from __future__ import annotations

import hmac
import secrets
import socket
from multiprocessing.connection import Connection
from typing import Literal

Purpose = Literal["steps", "life"]

TOKEN_BYTES = 32
HANDSHAKE_S = 10.0
_WELCOME = b"welcome"


class Door:
    """Where rank 0 waits for the others.

    Args:
        host: address of this machine under which the others reach it.

    Attributes:
        address: host and port.
        token: what a rank must show.
    """

    def __init__(self, host: str) -> None:
        self._server = socket.create_server((host, 0))
        self.address: tuple[str, int] = self._server.getsockname()[:2]
        self.token = secrets.token_bytes(TOKEN_BYTES)

    def accept(self, timeout_s: float) -> tuple[int, Purpose, Connection] | None:
        """The next rank that comes in, and what for; None if nobody did in time.

        Whoever does not show the token is turned away.
        """
        self._server.settimeout(timeout_s)
        try:
            guest, _ = self._server.accept()
        except TimeoutError:
            return None
        connection = _connection(guest)
        try:
            if connection.poll(HANDSHAKE_S):
                shown = connection.recv_bytes(TOKEN_BYTES)
                if hmac.compare_digest(shown, self.token) and connection.poll(HANDSHAKE_S):
                    rank, purpose = connection.recv()
                    connection.send_bytes(_WELCOME)
                    return rank, purpose, connection
        except (OSError, EOFError):
            pass
        connection.close()
        return None

    def close(self) -> None:
        """Nobody else comes in."""
        self._server.close()


def knock(address: tuple[str, int], token: bytes, rank: int, purpose: Purpose) -> Connection:
    """Come in as a rank.

    Raises:
        ConnectionError: nobody is there, or the token is wrong.
    """
    connection = _connection(socket.create_connection(address, HANDSHAKE_S))
    connection.send_bytes(token)
    connection.send((rank, purpose))
    try:
        if connection.poll(HANDSHAKE_S) and connection.recv_bytes(len(_WELCOME)) == _WELCOME:
            return connection
    except EOFError:
        pass
    connection.close()
    raise ConnectionError(f"rank {rank} was not let in at {address[0]}:{address[1]}")


def _connection(peer: socket.socket) -> Connection:
    peer.settimeout(None)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a plan must not wait for more
    return Connection(peer.detach())
