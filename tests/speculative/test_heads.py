"""Medusa: the text stays the target's, by enumeration and token for token; heads look as far ahead as they say; the target is
untouched."""

import copy
from itertools import combinations
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effkit
from effkit.caching import Fused, Paged, Preallocated, Recompute
from effkit.core import generation
from effkit.core.generation import Sampler, generate
from effkit.core.recipe import from_json, to_json
from effkit.core.task import Task
from effkit.core.technique import Identity
from effkit.speculative import heads, verify
from effkit.speculative.heads import Candidates, Medusa, cartesian, guess, guesses, likeliest, parents_of
from effkit.speculative.law import statistics
from effkit.zoo.data import Windows
from tests.caching.decoders import decoder, text
from tests.speculative.cycles import cyclic, learned, windows
from tests.speculative.worlds import enumerated, joint, largest_gap
from tests.subjects import mlp

GREEDY = Sampler(temperature=0.0)
SAMPLERS = {"plain": Sampler(), "cold": Sampler(temperature=0.4), "top-k": Sampler(top_k=2), "nucleus": Sampler(temperature=1.3, top_p=0.8)}
CACHES = {"concatenating": Identity(), "preallocated": Preallocated(), "none": Recompute(), "fused": Fused(), "paged": Paged(page_size=4)}


def tiny(seed: int):
    return decoder(seed, vocab_size=3, layers=1, heads=2, kv_heads=1, d_model=8, d_ff=8)


def own_words(model, rows: int = 24, length: int = 24, size: int = 8) -> Task:
    """What the model writes greedily, to train a draft on."""
    written = generate(model, text(1, rows=rows, vocab=model.config.vocab_size, seed=3), length - 1, sampler=GREEDY)
    windows = Windows(written.flatten(), length=length, size=size)
    return Task(train=windows, calib=windows)


def scattered(model, seed: int = 0, **settings):
    """With heads that were never trained and point anywhere."""
    made = Medusa(steps=0, **settings)(model)
    torch.manual_seed(seed)
    for parameter in made.decoding.parameters():
        torch.nn.init.normal_(parameter, std=3.0)
    return made


# exact


def gap(sampler=SAMPLERS["plain"], new=3, stop=None, **settings) -> float:
    model, ids = scattered(tiny(0), **{"heads": 2, "branching": (2, 2), **settings}), text(3, vocab=3)

    def program() -> tuple:
        return tuple(model.generate(ids, new, sampler=sampler, stop=stop)[0, 3:].tolist())

    outcome = enumerated(program)
    assert sum(outcome.values()) == pytest.approx(1, abs=1e-9)
    return largest_gap(outcome, joint(model, ids, new, sampler, stop))


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_joint_distribution_is_the_target_s_by_enumeration(sampler):
    assert gap(sampler) < 1e-9


@pytest.mark.parametrize("branching", [(3,), (1, 1), (3, 1), (1, 2, 1)])
def test_for_every_shape_of_tree(branching):
    assert gap(heads=len(branching), branching=branching) < 1e-9
    assert gap(heads=len(branching), branching=branching, new=2, stop=1) < 1e-9


def typical(proposal, p, rng, epsilon=0.3, delta=0.1):
    """The paper's rule: what is likely enough stays, without a coin."""
    below, branch = verify.children(proposal.parents), [-1]
    while True:
        here = p[branch[-1] + 1]
        entropy = -(here * here.clamp(min=1e-12).log()).sum()
        bar = min(epsilon, float(delta * torch.exp(-entropy)))
        right = [child for child in below[branch[-1] + 1] if here[proposal.tokens[child]] > bar]
        if not right:
            return branch[1:], verify.sample(here, rng)
        branch.append(right[0])


def test_typical_acceptance_writes_from_another_distribution(monkeypatch):
    monkeypatch.setattr(verify, "verify_tree", typical)
    assert gap() > 0.05


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float64, torch.float32]), cache=st.sampled_from(list(CACHES)))
def test_greedy_text_is_token_for_token_the_target_s(data, dtype, cache):
    branching = tuple(data.draw(st.lists(st.integers(1, 2), min_size=1, max_size=6)))
    model = scattered(CACHES[cache](decoder(0, dtype)), data.draw(st.integers(0, 99)), heads=len(branching), branching=branching)
    ids, new = text(data.draw(st.integers(1, 5))), data.draw(st.integers(0, 14))
    wanted = generate(model, ids, new, sampler=GREEDY)
    stop = data.draw(st.sampled_from([None, *wanted[0].tolist()]))
    seen = model.generate(ids, new, sampler=GREEDY, stop=stop)
    assert torch.equal(seen, generate(model, ids, new, sampler=GREEDY, stop=stop))


@pytest.mark.slow
@pytest.mark.parametrize("gamma", range(1, 9))
@pytest.mark.parametrize("cache", ["preallocated", "fused"])
def test_heads_that_are_mostly_right_change_nothing_but_the_number_of_passes(gamma, cache):
    model = learned(torch.bfloat16 if cache == "fused" else torch.float32)
    result = Medusa(heads=gamma, branching=(2,) + (1,) * (gamma - 1), lr=1e-2, steps=40)(CACHES[cache](model), windows())
    for new, stop in ((23, None), (40, int(cyclic(9)[-1]))):
        steps = list(result.decoding.passes(result, cyclic(5)[None], new, sampler=GREEDY, stop=stop))
        wanted = generate(CACHES[cache](model), cyclic(5)[None], new, sampler=GREEDY, stop=stop)
        assert torch.equal(torch.cat([step.tokens for step in steps]), wanted[0, 5:])
    assert max(step.accepted for step in steps) >= min(gamma, 3)


def test_a_line_runs_where_a_branch_cannot_be_kept():
    class Stubborn(generation.ConcatCache):
        move = generation.Cache.move

    for branching in ((1, 1), (2, 1)):
        model, ids = scattered(decoder(), heads=2, branching=branching), text(4)
        model.kv.new = lambda m, capacity: Stubborn(m.rope)
        if branching == (1, 1):
            assert torch.equal(model.generate(ids, 9, sampler=GREEDY), generate(model, ids, 9, sampler=GREEDY))
        else:
            with pytest.raises(ValueError, match="Stubborn cannot keep a branch of a token tree"):
                model.generate(ids, 9, sampler=GREEDY)


# what heads see


def test_head_k_is_about_the_token_k_plus_two_places_on():
    ids, model = torch.arange(12)[None], decoder()
    layers = torch.nn.ModuleList(torch.nn.Linear(16, 16, bias=False) for _ in range(3)).double()
    for k, (logits, tokens) in enumerate(guesses(model, layers, ids)):
        assert tokens.tolist() == [[*range(k + 2, 12)]]
        state = model.features(ids)[0, 4]
        wanted = model.logits((state + torch.nn.functional.silu(layers[k].weight @ state))[None, None])
        assert torch.allclose(logits[0, 4], wanted[0, 0])  # the state is that of token 4, the guess about token 6 + k


def states_are_the_last_ones(cache="concatenating", new=16) -> None:
    """At every pass, the heads read the state of the last token but one, the last that the target has seen."""
    model = scattered(CACHES[cache](decoder()), heads=2, branching=(3, 2))
    right, calls = Candidates.__call__, []

    def checked(self, ids, most, sampler, rng):
        if self.state is not None:
            wanted = model.features(ids[:, :-1])[0, -1]
            assert (self.state - wanted).abs().max() < 1e-9
            calls.append(1)
        return right(self, ids, most, sampler, rng)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Candidates, "__call__", checked)
        for sampler in (GREEDY, Sampler()):
            model.generate(text(4), new, sampler=sampler, rng=torch.Generator().manual_seed(0))
    assert len(calls) > new


@pytest.mark.parametrize("cache", CACHES)
def test_heads_read_the_last_state_that_the_target_reached(cache):
    states_are_the_last_ones(cache)


def test_the_state_of_a_rejected_token_is_caught(monkeypatch):
    monkeypatch.setattr(Candidates, "observe", lambda self, seen: setattr(self, "state", seen.features[-1]))
    with pytest.raises(AssertionError):
        states_are_the_last_ones()


def test_a_prompt_of_one_token_has_no_state_to_guess_from():
    model = scattered(decoder())
    first = next(model.decoding.passes(model, text(1), 5))
    assert first.proposed == 0


# training


def tokens_a_pass(steps: int, dtype=torch.float32) -> float:
    model = learned(dtype)
    result = Medusa(branching=(1, 1, 1), lr=1e-2, steps=steps)(model, windows())
    ids = cyclic(60)[None]
    assert torch.equal(result.generate(ids, 40, sampler=GREEDY), generate(model, ids, 40, sampler=GREEDY))
    return statistics(result.decoding.passes(result, ids, 40, sampler=GREEDY)).tokens_per_pass


def trained_heads_help() -> None:
    assert tokens_a_pass(steps=0) < 1.5 and tokens_a_pass(steps=60) > 2.5


@pytest.mark.slow
def test_trained_heads_give_more_tokens_a_pass():
    trained_heads_help()


@pytest.mark.slow
def test_heads_trained_for_a_place_too_early_are_caught(monkeypatch):
    def early(target, layers, ids):
        with torch.no_grad():
            states = target.features(ids)
        for k, head in enumerate(layers):
            yield target.logits(heads.guess(states[:, : -k - 1], head)), ids[:, k + 1 :]

    monkeypatch.setattr(heads, "guesses", early)
    with pytest.raises(AssertionError):
        trained_heads_help()


@pytest.mark.parametrize("frozen", [False, True])
def test_the_target_is_untouched(frozen):
    model = decoder()
    model.embedding.weight.requires_grad_(not frozen)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    result = Medusa(steps=3)(model, own_words(model))
    for m in (model, result):
        assert all(torch.equal(m.state_dict()[name], value) for name, value in before.items())
        assert all(p.grad is None for p in m.parameters())
        assert [p.requires_grad for p in m.parameters()][:1] == [not frozen] and m.blocks[0].ff.up.weight.requires_grad
    assert modes == [m.training for m in model.modules()]
    assert all(w.abs().max() > 0 for w in result.decoding.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_heads_have_the_model_s_dtype(dtype):
    model = decoder(dtype=torch.float32)
    result = Medusa(steps=2)(model.to(dtype), own_words(model))
    assert {p.dtype for p in result.decoding.parameters()} == {dtype}


def test_the_seed_orders_the_windows():
    model = decoder()
    task = own_words(model)
    task = Task(train=Windows(task.train.ids, length=24, size=4, shuffle=True))
    same, again, other = (Medusa(steps=4, seed=seed)(model, task).decoding.state_dict()["heads.0.weight"] for seed in (0, 0, 1))
    assert torch.equal(same, again) and not torch.equal(same, other)


# trees


def test_cartesian_tree_by_hand():
    assert cartesian((2, 1, 2)) == ((0,), (1,), (0, 0), (1, 0), (0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1))
    assert parents_of(cartesian((2, 1, 2))).tolist() == [-1, -1, 0, 1, 2, 2, 3, 3]


def worth(accuracy, paths) -> float:
    return sum(prod(accuracy[k][i] for k, i in enumerate(path)) for path in paths)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.lists(st.floats(0, 0.5), min_size=2, max_size=2), min_size=2, max_size=2), nodes=st.integers(1, 6))
def test_the_likeliest_tree_is_the_best_of_all_trees(rows, nodes):
    """Oracle: every set of so many nodes that holds the parent of each."""
    everything = cartesian((2, 2))
    trees = [t for t in combinations(everything, nodes) if all(path[:-1] in (*t, ()) for path in t)]
    found = likeliest(torch.tensor(rows, dtype=torch.float64), (2, 2), nodes)
    assert all(path[:-1] in ((), *found[:i]) for i, path in enumerate(found)), "parents first"
    assert set(found) in map(set, trees)
    assert worth(rows, found) == pytest.approx(max(worth(rows, t) for t in trees))


@torch.no_grad()
def test_loss_and_accuracies_place_by_place():
    """Oracle: each head at each place alone. Head k speaks of the token k + 2 places on, and counts 0.8^k (eq. 1)."""
    model, ids = decoder(), text(12, rows=2)
    made = scattered(model, heads=3, branching=(1, 1, 1)).decoding.heads
    states, losses, hits = model.features(ids), [], []
    for k, head in enumerate(made):
        said = [(model.logits(guess(states[row : row + 1, i : i + 1], head))[0, 0], ids[row, i + k + 2]) for row in range(2) for i in range(12 - k - 2)]
        losses.append(0.8**k * -torch.stack([logits.log_softmax(-1)[token] for logits, token in said]).mean())
        ranks = [int((logits > logits[token]).sum()) for logits, token in said]
        hits.append([ranks.count(rank) / len(ranks) for rank in range(5)])
    assert torch.allclose(heads.head_loss(model)(made, (ids, ids)).double(), sum(losses), atol=1e-5)
    assert torch.allclose(heads.accuracies(model, made, [(ids, ids)], 5).double(), torch.tensor(hits).double())


@pytest.mark.slow
def test_a_sparse_tree_keeps_what_heads_often_guess():
    model = decoder()
    task = own_words(model)
    sparse, whole = (Medusa(heads=3, branching=(3, 2, 2), nodes=n, lr=1e-2, steps=60)(model, task) for n in (7, None))
    assert len(sparse.decoding.paths) == 7 and len(whole.decoding.paths) == 21
    assert set(sparse.decoding.paths) <= set(whole.decoding.paths) and (0,) in sparse.decoding.paths
    one = Medusa(heads=3, branching=(3, 2, 2), nodes=1, steps=2)(model, task)
    assert one.decoding.gamma == 1 and len(one.decoding.heads) == 1


# files, recipes, refusals


def test_the_file_holds_its_heads_and_its_tree(tmp_path):
    model, ids = decoder(), text(6)
    result = Medusa(heads=2, branching=(3, 2), nodes=5, steps=3)(model, own_words(model))
    effkit.save(result, tmp_path / "model.safetensors")
    opened = effkit.load(tmp_path / "model.safetensors")
    assert opened.decoding.paths == result.decoding.paths and opened.decoding.numbers()["width"] == 16
    assert Medusa().claim(opened) == Medusa().claim(result)
    seen, wanted = (list(m.decoding.passes(m, ids, 20, sampler=GREEDY)) for m in (opened, result))
    assert statistics(seen) == statistics(wanted)


def test_its_claim_is_what_the_heads_weigh():
    model = decoder()
    own = sum(p.numel() for p in model.parameters())
    assert Medusa().claim(scattered(model)).value == pytest.approx(3 * 16 * 16 / own)


def test_recipes_round_trip():
    technique = Medusa(heads=2, branching=(5, 2), nodes=7, steps=3)
    assert from_json(to_json(technique), effkit.techniques()) == technique


REFUSED = {
    "heads must be a whole number from 1 to 8, got 9": lambda: Medusa(heads=9),
    r"branching must be 3 whole numbers, at least 1, got \(4, 2\): write branching=\(2, 2, 2\)": lambda: Medusa(branching=(4, 2)),
    r"branching \(9, 9, 9\) makes 819 proposals a pass, at most 512": lambda: Medusa(branching=(9, 9, 9)),
    "nodes must be a whole number from 1 to 20, got 21: the tree of `branching` has no more": lambda: Medusa(nodes=21),
    "asks for 40 guesses at a place, and there are 32 tokens to choose from: ask for fewer": lambda: Medusa(heads=1, branching=(40,))(decoder()),
    "Medusa looks 4 tokens ahead, and task.train has windows of 4: give it longer ones": lambda: Medusa()(decoder(), own_words(decoder(), length=4)),
    "Medusa reads task.train, which this task lacks": lambda: Medusa()(decoder()),
    "Medusa reads task.calib, which this task lacks": lambda: Medusa(nodes=4, steps=0)(decoder()),
    "Medusa needs a decoder": lambda: Medusa()(mlp()),
}


@pytest.mark.parametrize("said, call", REFUSED.items(), ids=range(len(REFUSED)))
def test_what_cannot_work_is_refused_with_the_way_out(said, call):
    with pytest.raises(ValueError, match=said):
        call()
