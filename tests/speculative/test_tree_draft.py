"""Trees of a draft: every node is the draft's own guess behind its branch; exact by enumeration and chi-square; greedy text
identical; a tree gives no fewer tokens than its first branch; masks that leak."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import effkit
from effkit.caching import H2O, Fused, Paged, Preallocated, Recompute
from effkit.core import generation
from effkit.core.generation import Sampler, generate
from effkit.core.recipe import from_json, to_json
from effkit.core.technique import Identity
from effkit.speculative import EarlyExit, Speculative, tree, verify
from effkit.speculative.law import Pass, statistics
from effkit.speculative.speculate import look, speculate
from effkit.speculative.tree import SpeculativeTree, TreeDraft
from effkit.speculative.verify import Proposal, judge
from tests.caching.decoders import decoder, text
from tests.speculative.cycles import cyclic, learned
from tests.speculative.worlds import enumerated, goodness, joint, largest_gap

GREEDY = Sampler(temperature=0.0)
SAMPLERS = {"plain": Sampler(), "cold": Sampler(temperature=0.4), "top-k": Sampler(top_k=2), "nucleus": Sampler(temperature=1.3, top_p=0.8)}
CACHES = {"concatenating": Identity(), "preallocated": Preallocated(), "none": Recompute(), "fused": Fused(), "paged": Paged(page_size=4)}


def tiny(seed: int, sharpness: float = 10.0):
    return decoder(seed, sharpness=sharpness, vocab_size=3, layers=1, heads=2, kv_heads=1, d_model=8, d_ff=8)


def every_outcome(program) -> dict:
    """As `enumerated`, where children are drawn for several nodes at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree, "sample", lambda p, rng: torch.cat([verify.sample(row[None], rng) for row in p]))
        return enumerated(program)


# what is proposed


def branch_of(proposal: Proposal, node: int) -> list[int]:
    parents, branch = line_or_tree(proposal), []
    while node >= 0:
        branch, node = [int(proposal.tokens[node]), *branch], int(parents[node])
    return branch


def line_or_tree(proposal: Proposal) -> torch.Tensor:
    return torch.arange(len(proposal.tokens)) - 1 if proposal.parents is None else proposal.parents


@torch.no_grad()
def nodes_are_the_draft_s_own(cache="concatenating", branching=(3, 2, 1), sampler=GREEDY, new=14) -> None:
    """Of every pass while a text grows, against the draft without any cache, anew for each branch."""
    draft, ids = CACHES[cache](decoder(1)), text(4)
    propose, seen = TreeDraft(draft, branching, capacity=40), []
    right = TreeDraft.__call__

    def checked(self, ids, most, sampler, rng):
        proposal = right(self, ids, most, sampler, rng)
        parents = line_or_tree(proposal)
        for node in range(-1, len(proposal.tokens)):
            branch, children = branch_of(proposal, node), (parents == node).nonzero()[:, 0]
            logits = draft(torch.cat((ids, torch.tensor([branch], dtype=torch.long)), 1))[0, -1]
            if sampler.temperature == 0:
                assert torch.equal(proposal.tokens[children], logits.topk(len(children)).indices)
            elif len(children):
                assert torch.allclose(proposal.q[node + 1], sampler.probabilities(logits))
                assert len(set(proposal.tokens[children].tolist())) == len(children), "no token twice"
            assert len(branch) <= most and (len(children) == 0 or len(children) == branching[len(branch)])
        seen.append(len(parents))
        return proposal

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TreeDraft, "__call__", checked)
        list(speculate(decoder(1, sharpness=9.0), propose, ids, new, gamma=len(branching), sampler=sampler, rng=torch.Generator().manual_seed(0)))
    assert max(seen) == 15 or branching != (3, 2, 1)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("sampler", [GREEDY, Sampler(temperature=3.0)], ids=["greedy", "sampled"])
def test_every_node_is_what_the_draft_says_behind_its_branch(cache, sampler):
    nodes_are_the_draft_s_own(cache, sampler=sampler)
    nodes_are_the_draft_s_own(cache, branching=(1, 1, 1, 1), sampler=sampler)


@torch.no_grad()
def test_one_pass_of_the_draft_a_level():
    draft, passes = decoder(1), []
    draft.norm.register_forward_hook(lambda module, inputs, output: passes.append(output.shape[1]))
    TreeDraft(draft, (3, 2, 1), capacity=40)(text(7), 3, GREEDY, None)
    assert passes == [6, 1, 1 + 3, 1 + 3 + 6], "behind what stands before it each is fed what is above it anew, the last token of the text first"


right_mask = generation.visible


def leaky(positions, held, ancestors=None):
    """In a tree a token sees all that were fed before it, siblings too; positions are right."""
    return right_mask(positions, held, None if ancestors is None else torch.ones_like(ancestors).tril())


PLANTED = {
    "a rollback that forgets nothing": (TreeDraft, "read", property(lambda self: 10**6, lambda self, value: None)),
    "siblings that see each other": (generation, "visible", leaky),
    "places off by one": (TreeDraft, "behind", lambda self, *settings: right_behind(self, *settings).roll(1, 0)),
}
right_behind = TreeDraft.behind


@pytest.mark.parametrize("where, name, bug", PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_bug_is_seen_in_what_is_proposed(monkeypatch, where, name, bug):
    monkeypatch.setattr(where, name, bug, raising=False)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        nodes_are_the_draft_s_own()


# exact


def gap(branching=(2, 1), sampler=SAMPLERS["plain"], new=2, stop=None, leaks=None) -> float:
    target, draft, ids = tiny(0), tiny(1), text(3, vocab=3)
    if leaks:
        leaks(target, draft)

    def program() -> tuple:
        propose = TreeDraft(draft, branching, capacity=20)
        steps = speculate(target, propose, ids, new, gamma=len(branching), sampler=sampler, stop=stop)
        return tuple(torch.cat([step.tokens for step in steps]).tolist())

    outcome = every_outcome(program)
    assert sum(outcome.values()) == pytest.approx(1, abs=1e-9)
    return largest_gap(outcome, joint(target, ids, new, sampler, stop))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("branching", [(2, 1), (1, 2), (3,)])
def test_joint_distribution_is_the_target_s_by_enumeration(sampler, branching):
    assert gap(branching, SAMPLERS[sampler]) < 1e-9


@pytest.mark.slow
def test_over_three_tokens_and_to_a_stop():
    assert gap((2, 1), SAMPLERS["top-k"], new=3) < 1e-9 and gap((3, 2), SAMPLERS["top-k"], new=3, stop=1) < 1e-9


def p_value(branching=(2, 2), n=700, seed=0) -> float:
    target, draft, ids, sampler = tiny(0, 5.0), tiny(1, 5.0), text(3, vocab=3), Sampler(temperature=1.5)
    rng, made = torch.Generator().manual_seed(seed), Counter()
    for _ in range(n):
        steps = speculate(target, TreeDraft(draft, branching, capacity=20), ids, 3, gamma=2, sampler=sampler, rng=rng)
        made[tuple(torch.cat([step.tokens for step in steps]).tolist())] += 1
    return goodness(made, joint(target, ids, 3, sampler), n)


@pytest.mark.slow
def test_joint_distribution_is_the_target_s_by_chi_square():
    assert p_value() > 1e-3


def test_children_drawn_with_putting_back_are_refused(monkeypatch):
    monkeypatch.setattr("effkit.speculative.tree.several", lambda q, width, rng: torch.stack([tree.sample(q, rng) for _ in range(width)], 1))
    assert gap() > 0.01


DISTRIBUTIONS = {
    "squared": lambda q: q.square() / q.square().sum(-1, keepdim=True),
    "of the node before": lambda q: q.roll(1, 0),
    "of the draft at another temperature": lambda q: q.sqrt() / q.sqrt().sum(-1, keepdim=True),
}


@pytest.mark.parametrize("bug", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())
def test_a_distribution_that_is_not_the_one_drawn_from_is_refused(monkeypatch, bug):
    right = TreeDraft.__call__

    def wrong(self, *settings):
        made = right(self, *settings)
        return made if made.q is None else Proposal(made.tokens, bug(made.q), made.parents)

    monkeypatch.setattr(TreeDraft, "__call__", wrong)
    assert gap((2, 1)) > 0.005


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float64, torch.float32]), cache=st.sampled_from(list(CACHES)))
def test_greedy_text_is_token_for_token_the_target_s(data, dtype, cache):
    """With drafts that are mostly right, half wrong and always wrong, over each cache, in target and draft."""
    branching = tuple(data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)))
    draft = data.draw(st.sampled_from([Identity(), EarlyExit(0.5)]))
    model = CACHES[cache](decoder(0, dtype))
    ids, new = text(data.draw(st.integers(1, 5))), data.draw(st.integers(0, 14))
    stop = data.draw(st.sampled_from([None, *generate(model, ids, new, sampler=GREEDY)[0].tolist()]))
    made = SpeculativeTree(draft, branching)(model).generate(ids, new, sampler=GREEDY, stop=stop)
    assert torch.equal(made, generate(model, ids, new, sampler=GREEDY, stop=stop))


@torch.no_grad()
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("branching", [(3, 2, 1), (2, 1), (1, 1)])
def test_a_prompt_of_one_token(cache, branching):
    """Nothing stands before it that could be read alone, and the next pass takes back all that was fed."""
    model, ids = CACHES[cache](decoder(0, torch.float32)), text(1)
    made = SpeculativeTree(EarlyExit(0.5), branching)(model)
    assert torch.equal(made.generate(ids, 16, sampler=GREEDY), generate(model, ids, 16, sampler=GREEDY))
    fed = TreeDraft(model, branching, capacity=20)
    for _ in range(2):
        fed(ids, len(branching), GREEDY, None)
        assert fed.cache.length <= 1 + sum(math.prod(branching[:i]) for i in range(1, len(branching)))


@pytest.mark.parametrize("levels", range(1, 9))
def test_a_copy_as_draft_is_right_to_the_end_of_its_tree(levels):
    """In bfloat16, over fused blocks: a tree, a line and one by one are the same bit for bit."""
    model, ids = Fused()(learned(torch.bfloat16)), cyclic(9)[None]
    made = SpeculativeTree(Identity(), (2,) + (1,) * (levels - 1))(model)
    steps = list(made.decoding.passes(made, ids, 30, sampler=GREEDY))
    assert torch.equal(torch.cat([step.tokens for step in steps]), generate(model, ids, 30, sampler=GREEDY)[0, 9:])
    assert all(step.accepted == levels for step in steps[:-1])


def test_nothing_is_fed_beyond_the_end_of_the_context():
    model, ids, fed = SpeculativeTree(Identity())(decoder(context=20)), text(4), []
    for part in (model, model.decoding.draft):
        part.kv.new = lambda m, capacity: Watched(m.rope, fed)
    assert torch.equal(model.generate(ids, 16, sampler=GREEDY), generate(decoder(context=20), ids, 16, sampler=GREEDY))
    assert max(fed) == 18, "the last token is written, never read"


class Watched(generation.ConcatCache):
    def __init__(self, rope, fed):
        super().__init__(rope)
        self.fed_at = fed

    def advance(self, n, parents=None, **where):
        positions = super().advance(n, parents, **where)
        self.fed_at += positions.tolist()
        return positions


# what a tree gives


def accepted_on_average(branching, target, draft, ids, sampler) -> float:
    """Of one pass, over everything that may be drawn."""

    def program() -> int:
        propose = TreeDraft(draft, branching, capacity=20)
        return next(speculate(target, propose, ids, len(branching) + 1, gamma=len(branching), sampler=sampler)).accepted

    return sum(n * chance for n, chance in every_outcome(program).items())


@pytest.mark.slow
@pytest.mark.parametrize("sampler, seed", [("top-k", 0), ("top-k", 1), ("top-k", 2), ("plain", 0)])
def test_a_tree_gives_no_fewer_tokens_than_its_first_branch(sampler, seed):
    settings = tiny(seed, 5.0), tiny(seed + 10, 5.0), text(3, vocab=3, seed=seed), SAMPLERS[sampler]
    line, narrow, wide = (accepted_on_average(b, *settings) for b in ((1, 1), (2, 1), (2, 2)))
    assert line <= narrow + 1e-9 and narrow <= wide + 1e-9
    assert line < wide - 1e-2


@pytest.mark.slow
@torch.no_grad()
def test_greedily_pass_by_pass():
    """Behind each beginning of the text: the tree holds the line, so it is accepted no less far."""
    target, draft = decoder(0), decoder(0, sharpness=6.0)
    ids, gains = generate(target, text(4), 40, sampler=GREEDY), []
    for n in range(4, 40):
        far = []
        for branching in ((1, 1, 1), (3, 2, 1)):
            proposal = TreeDraft(draft, branching, capacity=60)(ids[:, :n], 3, GREEDY, None)
            logits = look(target, ids[:, :n], proposal, target.new_cache(capacity=60))[1]
            far.append(len(judge(proposal, logits, GREEDY, None)[0]))
        gains.append(far[1] - far[0])
    assert min(gains) >= 0 and sum(gains) > 5


def leaking(owner, monkeypatch):
    """Siblings see each other where this model runs, and only there."""
    inside, features = [], owner.features

    def watched(*args):
        inside.append(1)
        try:
            return features(*args)
        finally:
            inside.pop()

    monkeypatch.setattr(owner, "features", watched)
    monkeypatch.setattr(generation, "visible", lambda *args: (leaky if inside else right_mask)(*args))


def run(monkeypatch=None, whose=None):
    target, draft, ids = decoder(11, sharpness=200.0), decoder(11, sharpness=200.0), text(4)
    if whose:
        leaking({"target": target, "draft": draft}[whose], monkeypatch)
    steps = list(speculate(target, TreeDraft(draft, (3, 2, 2), capacity=80), ids, 60, gamma=3, sampler=GREEDY))
    return torch.cat([step.tokens for step in steps]), statistics(steps).tokens_per_pass


def test_a_mask_that_leaks_in_the_draft_costs_tokens_a_pass_and_changes_no_text(monkeypatch):
    right, whole = run()
    assert whole == 4, "a copy of the target is always right"
    text_of_leaking, leaky = run(monkeypatch, "draft")
    assert torch.equal(text_of_leaking, right) and leaky < whole


def test_a_mask_that_leaks_in_the_target_changes_the_text(monkeypatch):
    right, _ = run()
    wrong, _ = run(monkeypatch, "target")
    assert not torch.equal(wrong, right)


def test_in_the_target_it_is_refused_by_enumeration_and_in_the_draft_it_is_exact(monkeypatch):
    """Whatever q is, what was drawn from it is judged by it; the target's p is another where siblings leak into it."""
    assert gap((2, 2), SAMPLERS["top-k"]) < 1e-9
    with pytest.MonkeyPatch.context() as patch:
        assert gap((2, 2), SAMPLERS["top-k"], leaks=lambda target, draft: leaking(draft, patch)) < 1e-9
    with pytest.MonkeyPatch.context() as patch:
        assert gap((2, 2), SAMPLERS["top-k"], leaks=lambda target, draft: leaking(target, patch)) > 1e-3


def test_acceptance_of_a_tree_counts_levels():
    """A copy is always right: one of each level's nodes is accepted, and none of the others counts as refused."""
    model, ids = learned(), cyclic(9)[None]
    made = SpeculativeTree(Identity(), (3, 2))(model)
    found = statistics(made.decoding.passes(made, ids, 30, sampler=GREEDY))
    assert found.acceptance == 1 and found.tested == found.accepted < found.proposed
    tree, line = Proposal(torch.zeros(5), parents=torch.tensor([-1, -1, 0, 2, 1])), Proposal(torch.zeros(2))
    assert [tree.goes_on(branch) for branch in ([], [0], [0, 2], [0, 2, 3], [1], [1, 4])] == [True, True, True, False, True, False]
    assert [line.goes_on(branch) for branch in ([], [0], [0, 1])] == [True, True, False]
    assert [Pass(5, 2, ids[0, :3], more).tested for more in (True, False)] == [3, 2] and Pass(0, 0, ids[0, :1], False).tested == 0


def test_a_tree_that_does_not_branch_is_a_line_to_every_cache():
    model, ids = H2O(8, 2)(decoder()), text(6)
    for sampler in (GREEDY, Sampler()):
        made = SpeculativeTree(EarlyExit(0.5), (1, 1))(model).generate(ids, 8, sampler=sampler, rng=torch.Generator().manual_seed(0))
        assert made.shape == (1, 14)


# as a technique


def test_the_file_opens_without_the_recipe_which_round_trips(tmp_path):
    technique, model, ids = SpeculativeTree(EarlyExit(0.5), (2, 2)), decoder(), text(6)
    result = technique(model)
    effkit.save(result, tmp_path / "model.safetensors")
    opened = effkit.load(tmp_path / "model.safetensors")
    assert opened.decoding.branching == (2, 2) and technique.claim(opened) == technique.claim(result)
    seen, wanted = (statistics(m.decoding.passes(m, ids, 30, sampler=GREEDY)) for m in (opened, result))
    assert seen == wanted and from_json(to_json(technique), effkit.techniques()) == technique
    assert torch.equal(result.generate(text(6, rows=3), 20, sampler=GREEDY), model.generate(text(6, rows=3), 20, sampler=GREEDY))
    assert "a tree of (2, 2)" in str(effkit.log(result))


def test_its_claim_is_that_of_a_line():
    model = decoder()
    tree, line = SpeculativeTree(EarlyExit(0.5)), Speculative(EarlyExit(0.5))
    assert tree.claim(tree(model)) == line.claim(line(model)) and tree.needs == line.needs


REFUSED = {
    r"branching must be 1 whole numbers, at least 1, got \(\)": lambda: SpeculativeTree(branching=()),
    r"branching must be 2 whole numbers, at least 1, got \(2, 0\)": lambda: SpeculativeTree(branching=(2, 0)),
    r"branching \(9, 9, 9\) makes 819 proposals a pass": lambda: SpeculativeTree(branching=(9, 9, 9)),
    "asks for 40 guesses at a place, and there are 32 tokens": lambda: SpeculativeTree(branching=(40,))(decoder()),
    "draft must be a technique": lambda: SpeculativeTree(draft="gpt-small"),
    "branching must be": lambda: SpeculativeTree(branching=3),
}


@pytest.mark.parametrize("message, made", REFUSED.items(), ids=REFUSED.keys())
def test_bad_settings_are_refused(message, made):
    with pytest.raises(ValueError, match=message):
        made()


@pytest.mark.parametrize("whose", ["target", "draft"])
def test_a_cache_that_keeps_no_branch_is_refused_in_the_target_and_will_do_in_the_draft(whose):
    class Stubborn(generation.ConcatCache):
        move = generation.Cache.move

    model, ids = SpeculativeTree()(decoder()), text(4)
    {"target": model, "draft": model.decoding.draft}[whose].kv.new = lambda m, capacity: Stubborn(m.rope)
    if whose == "target":
        with pytest.raises(ValueError, match="Stubborn cannot keep a branch of a token tree"):
            model.generate(ids, 8, sampler=GREEDY)
    else:
        assert torch.equal(model.generate(ids, 8, sampler=GREEDY), generate(model, ids, 8, sampler=GREEDY))
