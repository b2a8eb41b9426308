"""What a server can take, by real passes of gpt-small over the stream of requests: `effkit bench`. Never in a timed test.

A policy's figure is tokens a second at the fastest arrivals at which 95 % of the answers come within twice the time that
they take when the machine is idle. It stands in the benchmark's name; its seconds say little.
"""

import pytest
import torch

from effkit import zoo
from effkit.caching import Fused
from effkit.caching.batching import POLICIES, serve, throughput_at_latency
from effkit.caching.streams import paced, stream


@pytest.fixture(autouse=True)
def all_threads():
    """The tests run on one thread; a race uses what the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(torch.multiprocessing.cpu_count())
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_throughput_at_equal_latency(benchmark, policy, prefix):
    benchmark.group = "40 requests, gpt-small"
    model, requests = Fused()(zoo.load("gpt-small")[0]), stream(seed=0, n=40)

    def served(rate, policy=policy):
        return serve(model, paced(requests, rate), pages=800, policy=policy, prefix=prefix)

    served(100.0)
    bound = 2 * served(0.1, "continuous").latency(95)
    found = benchmark.pedantic(
        lambda: throughput_at_latency(served, bound_s=bound, slowest=0.1, fastest=200.0, halvings=7), rounds=1
    )
    benchmark.extra_info |= {"bound, s": bound, "requests a second": found[0], "tokens a second": found[1].throughput}
    benchmark.stats.name = f"{policy}, prefix {prefix}: {found[0]:.2f} requests, {found[1].throughput:.0f} tokens a second within {bound:.2f} s"
