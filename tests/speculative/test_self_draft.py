"""Drafts made from the target: which blocks are left out, what that is worth, what training brings back."""

import copy
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effkit
from effkit.core.generation import Sampler, generate
from effkit.core.recipe import from_json, to_json
from effkit.core.task import Task
from effkit.core.technique import Identity
from effkit.distillation import Distill
from effkit.speculative import EarlyExit, SkipLayers, Speculative, self_draft
from effkit.speculative.draft import tensor_bytes
from effkit.speculative.law import statistics
from effkit.speculative.self_draft import acceptance, keep_blocks, least_missed, view
from effkit.speculative.verify import overlap
from effkit.zoo.data import Windows
from tests.caching.decoders import decoder, text
from tests.speculative.cycles import cyclic, learned, windows

GREEDY = Sampler(temperature=0.0)


def texts(vocab: int = 32, length: int = 12) -> Task:
    ids = text(200, vocab)[0]
    return Task(calib=Windows(ids, length=length, size=4), train=Windows(ids, length=length, size=4))


def idle(model, blocks):
    """The model with these blocks adding nothing."""
    with torch.no_grad():
        for i in blocks:
            model.blocks[i].attention.o.weight.zero_()
            model.blocks[i].ff.down.weight.zero_()
    return model


# acceptance


def test_a_draft_that_is_the_target_is_always_accepted():
    model = decoder()
    assert acceptance(model, model, texts().calib) == pytest.approx(1)
    assert acceptance(model, EarlyExit(0.5)(model), texts().calib) < 0.9


def test_acceptance_by_hand():
    model, other = decoder(), decoder(1)
    batch = next(iter(texts().calib))
    p, q = (m(batch[0]).softmax(-1) for m in (model, other))
    assert acceptance(model, other, [batch]) == pytest.approx(torch.minimum(p, q).sum(-1).mean().item(), rel=1e-5)
    assert torch.equal(overlap(p, q), overlap(q, p)), "it does not matter who drafts"


# which blocks


def weighed(chosen) -> float:
    """Blocks that are worth something alone and together."""
    return sum((3 * i + 1) % 7 for i in chosen) - 5 * (1 in chosen and 2 in chosen)


@settings(deadline=None)
@given(blocks=st.integers(1, 6), data=st.data(), seed=st.integers(0, 9))
def test_the_best_of_all_choices_where_all_are_tried(blocks, data, seed):
    skip = data.draw(st.integers(0, blocks))
    best = least_missed(weighed, blocks, skip, trials=20, seed=seed)
    assert weighed(best) == max(map(weighed, combinations(range(blocks), skip)))


@settings(deadline=None)
@given(blocks=st.integers(8, 14), skip=st.integers(3, 5), trials=st.integers(1, 30), seed=st.integers(0, 9))
def test_a_walk_is_no_worse_than_the_early_exit_it_begins_with_and_keeps_its_bill(blocks, skip, trials, seed):
    tried = []

    def worth(chosen):
        tried.append(chosen)
        return weighed(chosen)

    best = least_missed(worth, blocks, skip, trials=trials, seed=seed)
    assert tried[0] == tuple(range(blocks - skip, blocks)) and len(tried) == trials
    assert weighed(best) == max(map(weighed, tried)) and all(len(set(t)) == skip for t in tried)
    assert least_missed(weighed, blocks, skip, trials=trials, seed=seed) == best, "the same seed, the same walk"


@pytest.mark.parametrize("layers, lazy, trials", [(4, (1, 2), 6), (4, (0, 3), 6), (6, (1, 2), 10), (6, (4, 5), 1)])
def test_blocks_that_add_nothing_are_found(layers, lazy, trials):
    """Six and ten trials of 6 and 15 choices: all of them, and a walk."""
    model = idle(decoder(layers=layers), lazy)
    technique = SkipLayers(2 / layers, trials=trials, examples=4)
    result = technique(model, texts())
    assert f"without {lazy[0]}, {lazy[1]}" in str(effkit.log(result))
    assert torch.allclose(result(text(9)), model(text(9))) and technique.claim(result).value == layers - 2


def test_a_search_for_the_worst_is_noticed(monkeypatch):
    right = self_draft.acceptance
    monkeypatch.setattr(self_draft, "acceptance", lambda *models: -right(*models))
    with pytest.raises(AssertionError):
        test_blocks_that_add_nothing_are_found(4, (1, 2), 6)


def test_what_stays_runs_in_order_and_the_model_stays_whole():
    model, ids = decoder(layers=5), text(6)
    result = SkipLayers(skip=(3, 0))(model)
    with torch.no_grad():
        x, cache = model.embedding(ids), model.new_cache(capacity=6)
        cache.advance(6, dtype=x.dtype)
        for layer, block in enumerate(model.blocks[i] for i in (1, 2, 4)):
            x = block(x, cache, layer)
        assert torch.allclose(result(ids), model.logits(model.norm(x)))
    assert result.config.layers == 3 and len(model.blocks) == model.config.layers == 5


def test_a_share_is_rounded_to_whole_blocks():
    model = decoder(layers=4)
    kept = [len(SkipLayers(share, trials=1, examples=1)(model, texts()).blocks) for share in (0.3, 0.4, 0.6, 0.65)]
    assert kept == [3, 2, 2, 1]


@pytest.mark.parametrize("off", [SkipLayers(skip=()), SkipLayers(skip=0.9)])
def test_where_nothing_can_go_nothing_changes(off):
    model = decoder(layers=1)
    assert torch.equal(off(model)(text(5)), model(text(5)))


def test_a_view_is_another_model_of_the_same_tensors():
    model = decoder(layers=3)
    other = keep_blocks(view(model), [0, 2])
    assert len(model.blocks) == model.config.layers == 3 and len(other.blocks) == 2
    assert other.blocks[1] is model.blocks[2] and other.norm is model.norm


def test_a_search_leaves_modes_and_weights_alone():
    model = decoder(layers=4).train()
    before = copy.deepcopy(model.state_dict())
    result = SkipLayers(0.5, examples=2)(model, texts())
    assert all(m.training for m in (*model.modules(), *result.modules()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


REFUSED = {
    r"skip must name different blocks from 0 to 1, and leave one, got \(0, 1\): a share": lambda: SkipLayers(skip=(0, 1))(decoder()),
    r"skip must name different blocks from 0 to 1, and leave one, got \(2,\)": lambda: SkipLayers(skip=(2,))(decoder()),
    r"skip must name different blocks from 0 to 3, and leave one, got \(1, 1\)": lambda: SkipLayers(skip=(1, 1))(decoder(layers=4)),
    r"skip must be a number in \(0.0, 1.0\), got 1.0: a share of the blocks; or name them": lambda: SkipLayers(skip=1.0),
    "trials must be a whole number from 1 to 10000, got 0": lambda: SkipLayers(trials=0),
    "SkipLayers reads task.calib, which this task lacks": lambda: SkipLayers()(decoder()),
    "SkipLayers needs a decoder with `blocks`": lambda: SkipLayers(skip=(0,))(without_blocks()),
}


def without_blocks():
    model = decoder()
    model.blocks = torch.nn.Sequential(*model.blocks)
    return model


@pytest.mark.parametrize("message, made", REFUSED.items(), ids=REFUSED.keys())
def test_bad_settings_are_refused(message, made):
    with pytest.raises(ValueError, match=message):
        made()


# as a draft


@pytest.mark.parametrize("draft", [EarlyExit(0.5), SkipLayers(skip=(0, 2)), SkipLayers(skip=(0, 1, 2))], ids=repr)
def test_none_of_a_draft_s_matrices_is_held_or_written_twice(draft, tmp_path):
    model, ids = decoder(dtype=torch.float32, layers=4), text(6)
    result = Speculative(draft)(model)
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1) * 4
    assert tensor_bytes(result) <= tensor_bytes(model) + vectors
    plain, both = (effkit.save(m, tmp_path / "model.safetensors") for m in (model, result))
    assert both - plain < 8000 + vectors, "the header may grow; no matrix may be written twice"
    opened = effkit.load(tmp_path / "model.safetensors")
    assert torch.equal(opened.decoding.draft(ids), result.decoding.draft(ids)) and tensor_bytes(opened) == tensor_bytes(result)
    for m in (result, opened):
        assert torch.equal(m.generate(ids, 20, sampler=GREEDY), generate(model, ids, 20, sampler=GREEDY))


def test_sharing_by_name_alone_is_noticed(monkeypatch, tmp_path):
    from effkit.speculative import draft

    def by_name(mine, target):
        theirs = dict(target.named_parameters())
        for path, module in mine.named_modules():
            for name, tensor in module._parameters.items():
                twin = theirs.get(f"{path}.{name}")
                if tensor is not None and twin is not None and draft._same(tensor, twin):
                    module._parameters[name] = twin

    monkeypatch.setattr("effkit.speculative.speculate.share", by_name)
    with pytest.raises(AssertionError):
        test_none_of_a_draft_s_matrices_is_held_or_written_twice(SkipLayers(skip=(0, 2)), tmp_path)


# trained, by chapter 03


def exit_of(epochs: int, depth: float = 0.5):
    """The same exit, untrained and trained on what the target says about its own language."""
    model, task = learned(), windows()
    draft = EarlyExit(depth) if not epochs else Distill(student=EarlyExit(depth), alpha=0.0, temperature=1.0, epochs=epochs, lr=1e-2)
    return model, Speculative(draft=draft, gamma=4)(model, task), task


def training_helps():
    (model, before, task), (_, after, _) = exit_of(0), exit_of(3)
    worth = [acceptance(model, m.decoding.draft, task.calib) for m in (before, after)]
    passes = [statistics(m.decoding.passes(m, cyclic(20)[None], 60, sampler=GREEDY)).tokens_per_pass for m in (before, after)]
    assert worth[0] < 0.9 and worth[1] > 0.95, worth
    assert passes[1] >= passes[0], passes


@pytest.mark.slow
def test_a_trained_exit_is_accepted_more_often():
    training_helps()


@pytest.mark.slow
def test_training_that_reads_the_wrong_teacher_is_noticed(monkeypatch):
    stranger = decoder(3, torch.float32, vocab_size=16)
    distill = __import__("effkit.distillation.distill", fromlist=["distillation_loss"])
    right = distill.distillation_loss
    monkeypatch.setattr(distill, "distillation_loss", lambda teacher, task, **settings: right(stranger, task, **settings))
    with pytest.raises(AssertionError):
        training_helps()


@pytest.mark.slow
def test_with_a_trained_exit_the_text_and_the_weights_are_the_target_s(tmp_path):
    model, result, _ = exit_of(1)
    ids = cyclic(8).repeat(3, 1)
    assert torch.equal(result.generate(ids, 30, sampler=GREEDY), generate(model, ids, 30, sampler=GREEDY))
    mine = {name: p for name, p in result.named_parameters(remove_duplicate=False) if not name.startswith("decoding.")}
    assert all(torch.equal(p, mine[name]) and p.grad is None for name, p in model.named_parameters())
    shared = {id(p) for p in mine.values()} & {id(p) for p in result.decoding.draft.parameters()}
    assert not shared, "what has learned is the draft's own"
    effkit.save(result, tmp_path / "model.safetensors")
    opened = effkit.load(tmp_path / "model.safetensors")
    assert torch.equal(opened.generate(ids, 30, sampler=GREEDY), generate(model, ids, 30, sampler=GREEDY))


def test_its_recipe_round_trips():
    technique = Speculative(draft=Distill(student=SkipLayers(skip=(1,)), alpha=0.0), gamma=3)
    assert from_json(to_json(technique), effkit.techniques()) == technique
    assert from_json(to_json(Speculative(SkipLayers(0.3))), effkit.techniques()) == Speculative(SkipLayers(0.3))


def test_an_exit_at_the_end_is_the_model():
    model = decoder()
    assert torch.equal(EarlyExit(1.0)(model)(text(5)), Identity()(model)(text(5)))
