"""What holds for every test: no network, the same seeds, and a visible reason for what was not run."""

import importlib.util
import os
import random
import socket

import numpy as np
import pytest
import torch
from hypothesis import settings

import effkit  # noqa: F401  (torchvision can be imported beside any torch from here on)
from effkit.stages import offline
from effkit.zoo.fetch import where
from tests.offline.sitecustomize import guarded

os.environ |= offline()  # child processes inherit it

# The laws are tried on tiny models, where a second thread costs more than it brings, and most on a busy machine.
torch.set_num_threads(1)

# A law is tested on the same examples everywhere; the machine may be slow.
settings.register_profile("effkit", deadline=None, derandomize=True)
settings.register_profile("quick", settings.get_profile("effkit"), max_examples=25)  # `effkit check`
settings.load_profile("effkit")


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Everything works without a network once installed: a connection that leaves the machine fails the test, whatever
    the code that tried would make of an error."""
    with pytest.MonkeyPatch.context() as patch:
        for method in ("connect", "connect_ex"):
            patch.setattr(socket.socket, method, guarded(getattr(socket.socket, method), pytest.fail))
        yield


@pytest.fixture(autouse=True)
def seeds():
    """Tests that forget to bring a generator are at least repeatable."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_runtest_setup(item):
    """Skips, with the way out, what needs a fetched model or a library that is not installed."""
    if item.get_closest_marker("real") and where("smollm2") is None:
        pytest.skip("smollm2 is not here: effkit fetch smollm2")
    for marker in item.iter_markers("peers"):
        missing = [name for name in marker.args if importlib.util.find_spec(name) is None]
        if missing:
            pytest.skip(f"{', '.join(missing)} not installed: python -m pip install -e '.[peers]'")
