"""No network, for every Python that starts with this folder in PYTHONPATH: processes that tests start, notebooks' kernels.

Python imports a module of this name before anything else. A connection that would leave the machine is refused at once;
the loopback stays open, for kernels are spoken to through it.

Python imports one module of this name, and a machine may have its own: Debian and conda ship one. It runs here, guarded.
"""

import os
import socket
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

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


def run_the_machines_own(name: str) -> None:
    """What Python would have imported if this folder were not in its path; what it raises, Python reports as ever."""
    here = os.path.dirname(os.path.realpath(__file__))
    spec = PathFinder.find_spec(name, [entry for entry in sys.path if os.path.realpath(entry) != here])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


for method in ("connect", "connect_ex"):
    setattr(socket.socket, method, guarded(getattr(socket.socket, method)))

if __name__ == "sitecustomize":  # as Python itself imports it, before anything else
    run_the_machines_own(__name__)
