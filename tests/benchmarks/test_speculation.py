"""Races of chapter 08: gpt-target's greedy texts of one prompt, with drafts and without, by effkit and by transformers; each group
a ratio to read within one run: `effkit bench`. Never in a timed test."""

from functools import partial

import pytest

from effkit.caching import Fused
from effkit.core.technique import Technique
from effkit.studies.decoding import NEW, PROMPT, drafts, loaded, prompts, theirs
from tests.benchmarks.test_decoding import all_threads  # noqa: F401

#: transformers knows the last two
DRAFTS = ("gpt-draft-distilled, 2 in a line", "lookup, else gpt-draft-distilled", "gpt-draft-distilled, 4 in a line", "prompt lookup")


def race(benchmark, run):
    benchmark.group = f"gpt-target, float32, {NEW} tokens after {PROMPT}"
    run()
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


def ours(technique: Technique | None):
    """Writes the text with the draft; None: without."""
    model, task = loaded("gpt-target")
    plain = Fused()(model)
    return partial((technique(plain, task) if technique else plain).generate, prompts("gpt-target", "held out", 1)[0], NEW, temperature=0.0)


def test_plain(benchmark):
    race(benchmark, ours(None))


@pytest.mark.parametrize("name", DRAFTS)
def test_with_a_draft(benchmark, name):
    race(benchmark, ours(drafts("gpt-target")[name]))


@pytest.mark.parametrize("how", ["theirs plain", "theirs drafting"])
@pytest.mark.parametrize("name", DRAFTS[2:])
def test_transformers(benchmark, name, how):
    pytest.importorskip("transformers")
    race(benchmark, theirs(loaded("gpt-target")[0], drafts("gpt-target")[name], prompts("gpt-target", "held out", 1))[how])
