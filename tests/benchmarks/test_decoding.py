"""Races of chapter 07: greedy texts of one prompt, each group a ratio to read within one run: `effkit bench`.
Never in a timed test."""

import pytest
import torch

from effkit import zoo
from effkit.caching import Fused, Preallocated, Recompute
from effkit.core.paths import data_dir

MODELS = [name for name in ("gpt-small", "gpt-target", "smollm2") if name == "smollm2" or (data_dir() / f"{name}.safetensors").exists()]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROMPT, NEW = 64, 64


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


def theirs(model, ids, **settings):
    """transformers' own greedy generation of the same weights."""
    pytest.importorskip("transformers")
    hf = model.to_hf().eval()
    if settings.pop("compiled", False):
        hf.forward = torch.compile(hf.forward)
    common = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None) | settings
    return lambda: hf.generate(ids, attention_mask=torch.ones_like(ids), **common)


OURS = {"recomputed": Recompute(), "concatenated": None, "preallocated": Preallocated(), "fused": Fused()}
THEIRS = {
    "transformers": {},
    "transformers, static cache": dict(cache_implementation="static"),
    "transformers, static cache, compiled": dict(cache_implementation="static", compiled=True),
}


@pytest.mark.parametrize("kind", [*OURS, *THEIRS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_64_tokens(benchmark, name, dtype, kind):
    benchmark.group = f"{name}, {dtype}, {NEW} tokens after {PROMPT}"
    model, ids = loaded(name, dtype)
    if kind in OURS:
        model = OURS[kind](model) if OURS[kind] else model
        run = lambda: model.generate(ids, NEW, temperature=0.0)  # noqa: E731
    else:
        run = theirs(model, ids, **THEIRS[kind])
    run()
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
