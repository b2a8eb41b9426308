"""The search on a table of made-up readings: proposals, repeats, resuming, kill -9, and what a journal survives."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import optuna
import pytest

from effkit.core.report import Reading
from effkit.core.task import Score
from effkit.core.technique import Technique
from effkit.selection import SAMPLERS, Candidate, Constraints, Search, Space
from effkit.selection import search as searches
from effkit.selection.constraints import BYTES
from effkit.selection.evolution import child
from effkit.selection.journal import journal, mend

ACCURACY = Score("accuracy", "", "higher")
SPACE = Space(
    {
        "RTN": {"bits": (2, 3, 4, 5, 6, 8), "group_size": (16, 32, 64), "symmetric": (False, True)},
        "SVD": {"keep": (0.2, 0.4, 0.6, 0.8)},
        "Magnitude": {"sparsity": (0.2, 0.4, 0.6, 0.8)},
    }
)


def toy(technique: Technique) -> Candidate:
    """A smooth trade-off: what takes bytes away costs accuracy, one technique more than another."""
    size, lost = 1000.0, 0.0
    for step in getattr(technique, "steps", (technique,)):
        match type(step).__name__:
            case "RTN":
                size, lost = size * (step.bits + 16 / step.group_size) / 32, lost + 0.5 ** (step.bits - 1)
                lost += 0.02 * step.symmetric
            case "SVD":
                size, lost = size * step.keep, lost + 0.3 * (1 - step.keep)
            case "Magnitude":
                size, lost = size * (1.1 - step.sparsity), lost + 0.2 * step.sparsity**2
    if lost > 0.6:
        return Candidate(technique, refused="ValueError: nothing is left of it")
    readings = {BYTES: Reading(size, "B", "counted"), "accuracy": Reading(0.95 - lost, "", "estimated", 0.01)}
    return Candidate(technique, readings)


def search(**changes) -> Search:
    return Search(
        **{"space": SPACE, "evaluate": toy, "score": ACCURACY, "limits": Constraints(max_bytes=150)} | changes
    )


def told(candidates) -> list[tuple]:
    return [(c.key, c.refused, {name: r.value for name, r in c.readings.items()}) for c in candidates]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_measures_as_many_different_candidates_as_asked_the_unchanged_model_first(sampler):
    found = search(sampler=sampler).run(25)
    assert len({c.key for c in found}) == len(found) == 25
    assert "Identity" in found[0].key
    assert all(told([c]) == told([toy(c.technique)]) for c in found)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_same_seed_same_search_another_seed_another(sampler):
    first, again, other = (told(search(sampler=sampler, seed=seed).run(15)) for seed in (1, 1, 2))
    assert first == again != other


def test_a_small_space_is_exhausted_and_then_it_ends():
    space = Space({"RTN": {"bits": (2, 3, 4)}, "SVD": {"keep": (0.5,)}})
    everything = {Candidate(t).key for t in space.everything()}
    assert {c.key for c in search(space=space).run(100)} == everything


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_goes_on_from_its_journal_with_the_proposals_it_would_have_made(sampler, tmp_path):
    wanted = told(search(sampler=sampler).run(24))
    path = tmp_path / "s.journal"
    for trials in (3, 11, 24):
        found = search(sampler=sampler, storage=path).run(trials)
        assert told(found) == wanted[:trials]
    assert told(search(sampler=sampler, storage=path).run(5)) == wanted[:5], "done is done"


def test_what_a_journal_tells_was_recorded_and_what_was_counted_stays_so(tmp_path):
    measured = searches.decoded(
        {
            **searches.encoded(toy(SPACE.plain("RTN"))),
            "readings": {"t": {"value": 1.0, "unit": "s", "provenance": "measured"}},
        }
    )
    assert measured.readings["t"].provenance == "recorded"
    found = search(storage=tmp_path / "s.journal").run(2)
    assert found[1].refused or found[1].readings[BYTES].provenance == "counted"


@pytest.mark.parametrize(
    "change",
    [
        {"limits": Constraints(max_bytes=151)},
        {"seed": 1},
        {"identity": "another model"},
        {"space": Space({"RTN": {"bits": (2, 3)}})},
        {"sampler": "random"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_study_of_another_search_is_refused(change, tmp_path):
    path = tmp_path / "s.journal"
    search(storage=path).run(2)
    with pytest.raises(ValueError, match="another model, space or limits; choose another name"):
        search(storage=path, **change).run(2)
    search(storage=path, study="another", **change).run(2)


@pytest.mark.parametrize(
    "settings, said", [({"sampler": "best"}, "tpe"), ({"seed": -1}, "seed"), ({"seed": 0.5}, "seed")]
)
def test_settings_are_checked(settings, said):
    with pytest.raises(ValueError, match=said):
        search(**settings)


@pytest.mark.parametrize("trials", [0, 2.5])
def test_trials_are_checked(trials):
    with pytest.raises(ValueError, match="trials"):
        search().run(trials)


def test_ctrl_c_says_how_to_go_on(tmp_path, capsys):
    calls = iter(range(100))

    def interrupted(technique):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return toy(technique)

    path = tmp_path / "s.journal"
    with pytest.raises(KeyboardInterrupt):
        search(evaluate=interrupted, storage=path).run(12)
    assert "stopped after 4 of 12 candidates" in "".join(capsys.readouterr())
    assert told(search(storage=path).run(12)) == told(search().run(12))


def test_optunas_own_loudness_stays_as_it_was(capsys):
    before = optuna.logging.get_verbosity()
    with pytest.warns(UserWarning, match="kept"):
        import warnings

        search().run(3)
        warnings.warn("kept", stacklevel=1)
    assert optuna.logging.get_verbosity() == before
    assert "Trial" not in capsys.readouterr().err


# the journal


def test_a_torn_line_is_cut_off(tmp_path):
    path = tmp_path / "s.journal"
    wanted = told(search(storage=path).run(6))
    with open(path, "ab") as file:
        file.write(b'{"op_code": 5, "worker')
    assert told(search(storage=path).run(8))[:6] == wanted


def test_mending_leaves_whole_files_alone(tmp_path):
    path = tmp_path / "f"
    mend(path)
    assert not path.exists()
    for content, wanted in ((b"", b""), (b"a\nb\n", b"a\nb\n"), (b"a\nb", b"a\n"), (b"a", b"")):
        path.write_bytes(content)
        mend(path)
        assert path.read_bytes() == wanted


def test_without_mending_a_torn_line_would_spoil_the_file(tmp_path, monkeypatch):
    from effkit.selection import journal as journals

    monkeypatch.setattr(journals, "mend", lambda path: None)
    with pytest.raises(ValueError):
        test_a_torn_line_is_cut_off(tmp_path)


def test_two_searches_share_a_journal(tmp_path):
    """As two processes do, in turns: each learns from the other, nothing is measured twice."""
    path, found = tmp_path / "s.journal", []
    for trials in range(2, 12, 2):
        found = search(storage=path).run(trials)
    assert len({c.key for c in found}) == 10


CHILD = """
    import os, sys, signal
    from pathlib import Path
    from tests.selection.test_search import search, toy
    calls, last = iter(range(100)), int(sys.argv[1])

    def deadly(technique):
        if next(calls) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return toy(technique)

    search(evaluate=deadly, storage=Path(sys.argv[2])).run(20)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is a matter of POSIX")
def test_a_search_goes_on_after_kill_9_as_if_nothing_had_happened(tmp_path):
    path = tmp_path / "s.journal"
    for last in (4, 0):
        command = [sys.executable, "-c", textwrap.dedent(CHILD), str(last), str(path)]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == -signal.SIGKILL, run.stderr
    assert len(search(storage=path).run(1)) == 1
    assert told(search(storage=path).run(20)) == told(search().run(20))


def test_a_candidate_that_was_measured_but_not_told_counts(tmp_path, monkeypatch):
    """Killed between the measurement's record and its end."""
    path = tmp_path / "s.journal"

    def killed(self, study, trial, candidate):
        raise KeyboardInterrupt

    search(storage=path).run(3)
    with monkeypatch.context() as patch:
        patch.setattr(Search, "_finish", killed)
        with pytest.raises(KeyboardInterrupt):
            search(storage=path).run(4)
    measured = []
    found = search(storage=path, evaluate=lambda t: measured.append(t) or toy(t)).run(5)
    assert len(measured) == 1 and told(found) == told(search().run(5))


def test_what_a_dead_process_bred_is_tried_before_more_is_bred(tmp_path, monkeypatch):
    """Killed between breeding a child and asking for it: the child waits in the journal."""
    path, wanted = tmp_path / "s.journal", told(search(sampler="evolution").run(20))

    def killed(self, study):
        raise KeyboardInterrupt

    search(sampler="evolution", storage=path).run(14)
    with monkeypatch.context() as patch:
        patch.setattr(Search, "_ask", killed)
        with pytest.raises(KeyboardInterrupt):
            search(sampler="evolution", storage=path).run(15)
    states = lambda: [t.state for t in optuna.load_study(study_name="selection", storage=journal(path)).trials]  # noqa: E731
    assert states().count(optuna.trial.TrialState.WAITING) == 1
    assert told(search(sampler="evolution", storage=path).run(15)) == wanted[:15]
    assert optuna.trial.TrialState.WAITING not in states(), "another child was bred although one waited"
    assert told(search(sampler="evolution", storage=path).run(20)) == wanted


def test_a_living_process_keeps_its_trial(tmp_path):
    study = optuna.create_study(storage=journal(tmp_path / "s.journal"), directions=["minimize"] * 2)
    owners = {f"elsewhere {os.getpid()}": False, f"{searches.socket.gethostname()} {os.getppid()}": False, "": True}
    for owner, gone in owners.items():
        trial = study.ask()
        trial.set_user_attr("owner", owner)
        assert searches.abandoned(study.trials[trial.number]) is gone


# does learning pay?


DEEP = Space(SPACE.techniques, longest=3)
WHOLE = [toy(technique) for technique in DEEP.everything()]


def regret(sampler: str, limit: int, seed: int) -> float:
    """By how much the best that keeps the limit is better than the best found, 100 of 900 candidates measured; after 40
    nothing can be told yet."""
    found = search(space=DEEP, sampler=sampler, seed=seed, limits=Constraints(max_bytes=limit)).run(100)
    best = (max((c.readings["accuracy"].value for c in cs if fits(c, limit)), default=0.0) for cs in (WHOLE, found))
    return next(best) - next(best)


def fits(candidate: Candidate, limit: int) -> bool:
    return bool(candidate.readings) and candidate.readings[BYTES].value <= limit


@cache
def mean_regret(sampler: str) -> float:
    return sum(regret(sampler, 80, seed) for seed in range(5)) / 5


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "evolution"])
def test_at_equal_budget_a_learner_comes_nearer_to_the_best_than_random_search(sampler):
    assert 0 <= mean_regret(sampler) < mean_regret("random")


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "evolution"])
def test_a_sampler_that_ignores_what_it_saw_is_caught(sampler, monkeypatch):
    learning = Search._sampler
    blind = {seed: search(sampler="random", seed=seed) for seed in range(5)}
    monkeypatch.setattr(Search, "_sampler", lambda self, *when: learning(blind[self.seed], *when))
    monkeypatch.setattr(searches, "child", lambda trials, rng: {})
    assert mean_regret.__wrapped__(sampler) >= mean_regret("random")


# breeding


def trial(bits: int, values: tuple[float, float], misses=()) -> optuna.trial.FrozenTrial:
    made = optuna.trial.create_trial(
        params={"RTN.bits": bits, f"only {bits}": bits},
        distributions={key: optuna.distributions.IntDistribution(0, 99) for key in ("RTN.bits", f"only {bits}")},
        values=values,
    )
    made.user_attrs["misses"] = list(misses)
    return made


def test_a_child_follows_its_parents_and_mutates_now_and_then():
    trials = [trial(n, (float(n), -float(n))) for n in range(10)]
    children = [child(trials, random.Random(seed)) for seed in range(300)]
    assert all(0 <= choice < 10 for c in children for choice in c.values())
    forks = [sum(fork.startswith("only") for fork in c) for c in children]
    assert {0, 1, 2} >= set(forks) and 2 in forks, "some children take from both"
    assert any("RTN.bits" not in c for c in children) and any("RTN.bits" in c for c in children)


def test_only_the_best_are_parents_and_limits_come_first():
    good = [trial(n, (float(n), -float(n)), misses=[-0.1]) for n in range(10)]
    beaten = [trial(50 + n, (100.0 + n, 100.0 + n), misses=[-0.1]) for n in range(10)]
    over = [trial(70 + n, (-100.0, -100.0), misses=[0.2]) for n in range(10)]
    for seed in range(50):
        assert all(choice < 10 for choice in child(good + beaten + over, random.Random(seed)).values())


def test_before_there_is_a_population_nothing_is_bred():
    assert child([trial(n, (1.0, 1.0)) for n in range(9)], random.Random(0)) == {}


def test_the_journal_is_plain_text(tmp_path):
    path: Path = tmp_path / "s.journal"
    search(storage=path).run(2)
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_process_of_another_user_is_alive(monkeypatch):
    def refused(pid, signal):
        raise PermissionError

    assert not searches._alive(2**22 + 1)
    monkeypatch.setattr(os, "kill", refused)
    assert searches._alive(1)
