"""What was asked is answered from memory: exactly; nearly, with its lies counted; and never what is drawn at random."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import effkit
from effkit.caching import ResultCache
from effkit.caching.results import Remembering, meaning, simulated
from effkit.core.generation import Sampler
from effkit.core.task import Task
from effkit.core.technique import Pipeline
from effkit.quantization import RTN
from effkit.speculative import Jacobi, Medusa, PromptLookup, Speculative
from tests.caching.decoders import decoder, text


def test_the_same_question_is_computed_once_and_answered_alike():
    model = decoder()
    quick, wanted = ResultCache()(model), model.generate(text(5), 9, temperature=0.0)
    passes = []
    quick.norm.register_forward_hook(lambda *_: passes.append(1))
    assert torch.equal(quick.generate(text(5), 9, temperature=0.0), wanted)
    once = len(passes)
    assert torch.equal(quick.generate(text(5), 9, temperature=0.0), wanted) and len(passes) == once
    assert (quick.decoding.hits, quick.decoding.asked) == (1, 2)


@pytest.mark.slow
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(1, 3))
def test_any_stream_is_answered_as_without(asked, capacity):
    model = decoder(layers=1)
    quick = ResultCache(capacity)(model)
    for seed in asked:
        assert torch.equal(quick.generate(text(4, seed=seed), 3, temperature=0.0), model.generate(text(4, seed=seed), 3, temperature=0.0))
        assert len(quick.decoding.known) <= capacity


def test_the_least_recently_used_goes_first():
    model = ResultCache(capacity=2)(decoder())
    for seed in (0, 1, 0, 2, 0):
        model.generate(text(4, seed=seed), 2, temperature=0.0)
    assert model.decoding.hits == 2 and len(model.decoding.known) == 2


def test_another_request_is_another_question():
    model = ResultCache()(decoder())
    model.generate(text(4), 3, temperature=0.0)
    model.generate(text(4), 4, temperature=0.0)
    model.generate(text(4), 4, temperature=0.0, stop=3)
    assert model.decoding.hits == 0


def test_what_is_drawn_is_drawn_anew():
    model = ResultCache()(decoder(sharpness=1.0))
    texts = {tuple(model.generate(text(4), 8, temperature=1.0, rng=torch.Generator().manual_seed(s))[0].tolist()) for s in range(5)}
    assert len(texts) > 1 and model.decoding.asked == 0


def test_weights_that_changed_and_copies_know_nothing():
    model = ResultCache()(decoder())
    model.generate(text(4), 3, temperature=0.0)
    with torch.no_grad():
        model.embedding.weight.mul_(-1)
    changed = model.generate(text(4), 3, temperature=0.0)
    assert model.decoding.hits == 0
    plain = decoder()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(changed, plain.generate(text(4), 3, temperature=0.0))
    copy = effkit.core.technique.clone(model)
    assert not copy.decoding.known and model.decoding.known


UNSEEN = {
    "a cast": lambda model: model.float(),
    "a cast there and back": lambda model: model.bfloat16().double(),
    "other data": lambda model: setattr(model.blocks[0].ff.up.weight, "data", -model.blocks[0].ff.up.weight.data),
    "other codes": lambda model: model.blocks[0].ff.up.load_state_dict({n: t.flip(0) for n, t in model.blocks[0].ff.up.state_dict().items()}),
}


@pytest.mark.parametrize("change", UNSEEN)
def test_whatever_way_weights_change_nothing_stale_is_answered(change):
    model = ResultCache()(RTN(bits=4, group_size=8)(decoder(), Task("none")) if change == "other codes" else decoder())
    before = model.generate(text(4), 12, temperature=0.0)
    with torch.no_grad():
        UNSEEN[change](model)
    wanted = model.decoding.inner(model, text(4), 12, sampler=Sampler(0.0))
    assert torch.equal(model.generate(text(4), 12, temperature=0.0), wanted) and model.decoding.hits == 0
    assert not torch.equal(before, wanted) or "cast" in change
    assert torch.equal(model.generate(text(4), 12, temperature=0.0), wanted) and model.decoding.hits == 1


def test_a_request_that_names_no_sampler_is_a_draw():
    model = ResultCache()(decoder(sharpness=1.0))
    texts = {tuple(model.decoding(model, text(4), 8, rng=torch.Generator().manual_seed(s))[0].tolist()) for s in range(5)}
    assert len(texts) > 1 and model.decoding.asked == 0


def test_rows_and_what_decodes_inside():
    model = decoder()
    quick, ids = ResultCache()(PromptLookup()(model)), text(4, rows=2)
    both = torch.cat((ids, ids[:1]))
    assert torch.equal(quick.generate(both, 6, temperature=0.0), model.generate(both, 6, temperature=0.0))
    assert quick.decoding.hits == 1


def test_a_way_to_guess_does_not_take_the_place_of_what_keeps_answers():
    for guess in (PromptLookup(), Jacobi(), Speculative(), Medusa(steps=0)):
        name = type(guess).__name__
        with pytest.raises(ValueError, match=f"{name} needs that no answers are kept yet, which this model lacks"):
            guess(ResultCache()(decoder()))
        with pytest.raises(ValueError, match=f"{name} needs that no answers are kept yet, which ResultCache removes; put {name} first"):
            Pipeline((ResultCache(), guess))


# nearly the same


def test_a_threshold_lets_near_prompts_answer():
    model = decoder(sharpness=1.0)
    near, far = text(12), text(12, seed=5)
    other = near.clone()
    other[0, 3] = (other[0, 3] + 1) % 32
    closeness = [float(meaning(model, near) @ meaning(model, x)) for x in (near, other, far)]
    assert closeness[0] == pytest.approx(1) and closeness[0] > closeness[1] > closeness[2]
    lying = ResultCache(threshold=(closeness[1] + closeness[2]) / 2)(model)
    answer = lying.generate(near, 5, temperature=0.0)[:, 12:]
    assert torch.equal(lying.generate(other, 5, temperature=0.0)[:, 12:], answer) and lying.decoding.hits == 1
    lying.generate(far, 5, temperature=0.0)
    assert lying.decoding.hits == 1


def test_the_simulation_is_what_the_cache_does():
    model = decoder(sharpness=1.0)
    prompts = [text(6, seed=s) for s in (0, 1, 0, 2, 3, 1, 4)] + [text(6, seed=0).roll(1)]
    answers = [tuple(model.generate(p, 3, temperature=0.0)[0, 6:].tolist()) for p in prompts]
    points = torch.stack([meaning(model, p) for p in prompts])
    for threshold in (1e-6, 0.2, 0.6, 0.9, 0.9999):
        hits, lies = simulated(points, answers, threshold)
        quick = ResultCache(threshold=threshold)(model)
        given_ = [tuple(quick.generate(p, 3, temperature=0.0)[0, 6:].tolist()) for p in prompts]
        assert quick.decoding.hits == int(hits.sum())
        assert [g != a for g, a in zip(given_, answers, strict=True)] == lies.tolist()


def test_a_higher_threshold_lies_less_and_a_cache_that_takes_all_lies_most():
    points = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1.0], [0.1, 0.9]]), dim=1)
    answers = [(0,), (1,), (2,), (2,)]
    found = {t: simulated(points, answers, t) for t in (-1.0, 0.9, 1.0)}
    assert found[-1.0][0].tolist() == [False, True, True, True] and found[-1.0][1].sum() == 3
    assert found[0.9][0].tolist() == [False, True, False, True] and found[0.9][1].tolist() == [False, True, False, False]
    assert not found[1.0][0].any()


def test_thresholds_that_are_no_cosine_and_models_without_features_are_refused():
    for bad in (1.5, 0.0, -0.5, float("nan")):
        with pytest.raises(ValueError, match="threshold must be a number"):
            ResultCache(threshold=bad)

    class Bare(torch.nn.Module):
        new_cache = generate = kv = decoding = None

    with pytest.raises(ValueError, match="a threshold needs a model with `features`, as GPT has; Bare has none: leave it None"):
        ResultCache(threshold=0.9)(Bare(), Task())


def test_a_cache_that_forgets_the_request_is_noticed(monkeypatch):
    right = Remembering._answer
    monkeypatch.setattr(Remembering, "_answer", lambda self, model, ids, new, settings: right(self, model, ids, 3, {}))
    with pytest.raises((AssertionError, TypeError)):
        test_another_request_is_another_question()


def test_the_file_opens_with_an_empty_memory(tmp_path):
    model = ResultCache(capacity=3)(decoder(dtype=torch.float32))
    model.generate(text(4), 3, temperature=0.0)
    effkit.save(model, tmp_path / "model.safetensors")
    opened = effkit.load(tmp_path / "model.safetensors")
    assert opened.decoding.capacity == 3 and not opened.decoding.known
    assert torch.equal(opened.generate(text(4), 3, temperature=0.0), model.generate(text(4), 3, temperature=0.0))
