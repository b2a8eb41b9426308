"""The space of sequences: what traits forbid is not in it, what the catalogue offers is."""

import random

import pytest

from effkit import catalog
from effkit.core.technique import Identity, Pipeline
from effkit.selection import Space, default_space, label
from effkit.selection import space as spaces
from effkit.selection.space import settings
from tests.subjects import gpt, mlp

SMALL = {"RTN": {"bits": (3, 4)}, "SVD": {"keep": (0.4, 0.7)}, "Magnitude": {"pattern": ("weights", "channels")}}


def names(technique) -> tuple[str, ...]:
    steps = technique.steps if isinstance(technique, Pipeline) else (technique,)
    return tuple(type(step).__name__ for step in steps)


def test_everything_is_each_candidate_once_and_none_that_the_traits_forbid():
    space = Space(SMALL).on(mlp())
    found = list(space.everything())
    assert len(set(found)) == len(found)
    orders = {names(t) for t in found}
    assert ("SVD", "RTN") in orders and ("RTN", "SVD") not in orders, "RTN removes the float weights that SVD needs"
    assert ("Magnitude", "RTN") in orders and ("RTN", "Magnitude") not in orders


def test_a_setting_may_decide_whether_an_order_is_forbidden():
    """A mask is in SVD's way, removed channels are not."""
    found = [label(t) for t in Space(SMALL).on(mlp()).everything()]
    assert "Magnitude(pattern=channels) > SVD(keep=0.4)" in found
    assert "Magnitude() > SVD(keep=0.4)" not in found


def test_all_of_it_is_counted_by_hand():
    """Nothing; RTN 2; SVD 2, then RTN 2 or Magnitude 2; Magnitude 2, then RTN 2, and SVD 2 after channels alone."""
    assert len(list(Space(SMALL).on(mlp()).everything())) == 1 + 2 + 2 * (1 + 2 + 2) + (1 + 2) + (1 + 2 + 2)


def test_random_walks_stay_within_everything():
    space, rng = Space(SMALL, longest=3).on(mlp()), random.Random(0)
    everything = set(space.everything())
    drawn = []
    for _ in range(200):
        try:
            drawn.append(space.draw(lambda what, options: rng.choice(list(options))))
        except ValueError as error:
            assert "forbid" in str(error)
    assert set(drawn) <= everything
    assert max(len(names(t)) for t in everything) == 3


def test_every_candidate_can_be_piped_on_the_model():
    for technique in Space(SMALL, longest=3).on(mlp()).everything():
        technique.check(mlp())


def test_what_needs_a_decoder_is_offered_to_decoders_alone():
    space = Space({"RTN": {}, "Preallocated": {}})
    assert set(space.on(gpt()).after(())) == {"RTN", "Preallocated"}
    assert set(space.on(mlp()).after(())) == {"RTN"}


def test_the_default_space_follows_the_catalogue():
    offered = default_space().techniques
    assert {"RTN", "SVD", "Magnitude", "W8A8"} <= set(offered)
    assert not {"QAT", "LoRA", "Distill", "Use", "Fresh", "Identity", "Pipeline"} & set(offered)
    assert {"QAT", "Distill"} <= set(default_space(training=True).techniques)
    assert {"bits", "group_size"} <= set(offered["RTN"]) and "layers" not in offered["RTN"]


@pytest.mark.parametrize("name", sorted(catalog.techniques()))
def test_every_offered_value_is_one_that_the_technique_takes(name):
    kind = catalog.techniques()[name]
    Space({name: settings(kind)})


@pytest.mark.parametrize(
    "techniques, said",
    [
        ({}, "no technique"),
        ({"RTM": {}}, "RTM"),
        ({"RTN": {"bitz": (3,)}}, "bitz"),
        ({"RTN": {"bits": (3, 17)}}, "17"),
        ({"RTN": {"bits": ()}}, "tuple of values"),
        ({"RTN": {"search": "min-max"}}, "tuple of values"),
    ],
)
def test_a_space_that_cannot_be_is_refused_before_the_search(techniques, said):
    with pytest.raises(ValueError, match=said):
        Space(techniques)


@pytest.mark.parametrize("longest", [0, 2.5, 7])
def test_longest_is_checked(longest):
    with pytest.raises(ValueError, match="longest"):
        Space(SMALL, longest=longest)


def test_short_names():
    rtn = catalog.techniques()["RTN"]
    assert label(Identity()) == label(Pipeline(())) == "unchanged"
    assert label(rtn()) == "RTN()" and label(Pipeline((rtn(bits=3), Identity()))) == "RTN(bits=3) > unchanged"
    distill = catalog.techniques()["Distill"](student=rtn(bits=2))
    assert label(distill) == "Distill(student=RTN(bits=2))"


def test_a_space_that_forgets_the_model_is_caught(monkeypatch):
    """An order that Pipeline refuses never gets through; what the model lacks, only the space knows."""
    monkeypatch.setattr(spaces.Space, "_allows", lambda self, steps: True)
    with pytest.raises(AssertionError):
        test_what_needs_a_decoder_is_offered_to_decoders_alone()
