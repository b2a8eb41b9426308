"""On a GPU: every technique leaves the model where it was, computing what it computes on the processor."""

import copy
from dataclasses import replace

import pytest
import torch

from effkit import catalog, load, save, zoo
from effkit.core.generation import Sampler
from effkit.measure import latency, quality
from effkit.speculative.batch import speculative_batch
from tests.caching.decoders import decoder, text
from tests.speculative.test_every_cache import CACHES, REFUSED, WAYS
from tests.subjects import SUBJECTS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: these tests want one")

TECHNIQUES = catalog.techniques()
#: what is trained or drawn at random on another device takes another path
TRAINED = {"QAT", "LSQ"}


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("name", sorted(TECHNIQUES))
def test_a_model_on_a_gpu(name, subject):
    technique, (build, task) = catalog.example(TECHNIQUES[name]), SUBJECTS[subject]
    model, task = build(), task()
    try:
        expected = technique(model, task)(*task.example)
    except ValueError as error:
        pytest.skip(f"refused on the processor too: {error}")
    task = task.to("cuda")
    result = technique(model.cuda(), task)
    held = {t.device.type for t in [*result.parameters(), *result.buffers()] if t.numel()}
    assert held <= {"cuda"}, f"{name} left something on {held}"
    with torch.no_grad():
        y = result(*task.example)
    assert y.device.type == "cuda" and y.isfinite().all()
    off = (y.cpu() - expected).norm() / expected.norm()
    assert off < (1.0 if name in TRAINED else 0.02), f"{name}: off by {off:.2%}"


@pytest.mark.parametrize("name", ["RTN", "W8A8", "AWQ", "NF4", "LoRA"])
def test_what_was_made_on_a_gpu_can_be_saved_and_opened(name, tmp_path):
    build, task = SUBJECTS["mlp"]
    task = task().to("cuda")
    model = catalog.example(TECHNIQUES[name])(build().cuda(), task)
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors").cuda()
    assert torch.equal(model(*task.example), again(*task.example))


def test_a_decoder_generates_the_same_on_a_gpu():
    build, task = SUBJECTS["gpt"]
    (prompt,) = task().example
    greedy = Sampler(temperature=0.0)
    on_processor = build().generate(prompt, 12, sampler=greedy)
    assert torch.equal(on_processor, build().cuda().generate(prompt.cuda(), 12, sampler=greedy).cpu())


@pytest.mark.parametrize("way", ["a random draft, 4", "a tree of half of it", "lookup, 4", "lookahead", "Medusa", "EAGLE"])
@pytest.mark.parametrize("cache", CACHES)
def test_every_cache_and_way_to_guess_writes_the_same_on_a_gpu(cache, way):
    model = CACHES[cache](decoder())
    wanted, there = model.generate(text(11), 30, temperature=0.0), copy.deepcopy(model).cuda()
    assert torch.equal(there.generate(text(11).cuda(), 30, temperature=0.0).cpu(), wanted)
    if (cache, way) not in REFUSED:
        assert torch.equal(WAYS[way](model).cuda().generate(text(11).cuda(), 30, temperature=0.0).cpu(), wanted)


@pytest.mark.parametrize("cache", ["preallocated", "paged", "fused"])
def test_several_texts_are_written_on_a_gpu(cache):
    model, draft = (CACHES[cache](decoder(seed)) for seed in (0, 1))
    texts = [text(n)[0] for n in (3, 9)]
    wanted = speculative_batch(model, draft, texts, 12, sampler=Sampler(temperature=0.0))
    made = speculative_batch(model.cuda(), draft.cuda(), [ids.cuda() for ids in texts], 12, sampler=Sampler(temperature=0.0))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(made, wanted, strict=True))


@pytest.mark.parametrize("name", ["mlp", "gpt-small"])
def test_a_score_is_the_same_on_a_gpu(name):
    model, task = zoo.load(name)
    task = replace(task, test=task.test.first(32))
    here = quality(model, task).value
    assert quality(model.cuda(), task.to("cuda")).value == pytest.approx(here, abs=0.01)


def test_latency_waits_for_the_gpu():
    """Starting a kernel takes microseconds whatever it computes; this one takes at least 1.4e12 operations' time."""
    a = torch.randn(8192, 8192, device="cuda")
    assert latency(lambda: a @ a, budget_s=0.2).value > 1.1e12 / 1e15
    assert latency(lambda: a @ a, budget_s=0.2).value > 10 * latency(lambda: a[:8, :8] @ a[:8, :8], budget_s=0.2).value
