"""Races of chapter 07: greedy texts of one prompt, each group a ratio to read within one run: `effkit bench`.
Never in a timed test."""

from functools import partial

import pytest
import torch

from effkit import zoo
from effkit.core.paths import data_dir
from effkit.studies.decoding import CACHES, NEW, PROMPT, THEIRS, by_transformers

MODELS = [name for name in ("gpt-small", "gpt-target", "smollm2") if name == "smollm2" or (data_dir() / f"{name}.safetensors").exists()]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(autouse=True)
def all_threads():
    """The tests run on one thread; a race uses what the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(torch.multiprocessing.cpu_count())
    yield
    torch.set_num_threads(before)


_loaded: dict = {}


def loaded(name: str, dtype: str):
    """A model and a held-out prompt of its task."""
    if (name, dtype) not in _loaded:
        try:
            model, task = zoo.load(name, DTYPES[dtype])
        except FileNotFoundError as error:
            pytest.skip(str(error))
        _loaded.clear()  # one at a time: memory
        _loaded[name, dtype] = model, task.val.at(0)[0][:1, :PROMPT]
    return _loaded[name, dtype]


@pytest.mark.parametrize("kind", [*CACHES, *(f"transformers, {how}" for how in THEIRS)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_64_tokens(benchmark, name, dtype, kind):
    benchmark.group = f"{name}, {dtype}, {NEW} tokens after {PROMPT}"
    model, ids = loaded(name, dtype)
    if kind in CACHES:
        run = partial(CACHES[kind](model).generate, ids, NEW, temperature=0.0)
    else:
        pytest.importorskip("transformers")
        run = by_transformers(model, [ids], **THEIRS[kind.removeprefix("transformers, ")])
    run()
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
