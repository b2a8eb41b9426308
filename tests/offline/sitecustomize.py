"""No network, for every Python that starts with this folder in PYTHONPATH: processes that tests start, notebooks' kernels.

Python imports a module of this name before anything else. A connection that would leave the machine is refused at once;
the loopback stays open, for kernels are spoken to through it.
"""

import socket

LOOPBACK = ("127.", "::1", "localhost")


class LeavesTheMachine(RuntimeError):
    """Not an OSError: code that takes a failed connection in its stride would hide what it tried."""


def refuse(why: str) -> None:
    raise LeavesTheMachine(why)


def guarded(connect, refuse=refuse):
    def within(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(LOOPBACK):
            refuse(f"something tried to reach {address}: effkit works without a network")
        return connect(self, address)

    return within


for method in ("connect", "connect_ex"):
    setattr(socket.socket, method, guarded(getattr(socket.socket, method)))
