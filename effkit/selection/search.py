"""The search: Optuna proposes, a journal remembers, and what was interrupted goes on.

Problem   Thousands of candidates, seconds each: no time to try them all.
Idea      Learn from those tried where to look next. TPE models the settings of good and of bad candidates and proposes
          where the ratio of the two densities is high; evolution (evolution.py) breeds the frontier; random search
          learns nothing, and is the baseline that the others have to beat.
Resuming  Proposal k is a function of (seed, the candidates measured before it) alone, as batch k of a training run
          is. So a search that was killed goes on with the very proposals that it would have made.
Sharing   Several processes of one host may work on one journal file; what a dead one left half done is proposed again.
Source    Bergstra et al. 2011, "Algorithms for hyper-parameter optimization", NeurIPS 24 (TPE);
          Akiba et al. 2019, arXiv:1907.10902 (Optuna, define by run).
"""

import hashlib
import json
import os
import random
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState
from tqdm.auto import tqdm

from effkit import catalog
from effkit.core import recipe
from effkit.core.checks import require_choice, require_int, require_seed
from effkit.core.report import Reading
from effkit.core.task import Score
from effkit.core.technique import Identity, Technique
from effkit.selection.candidates import Candidate, costs
from effkit.selection.constraints import Constraints
from effkit.selection.evolution import child
from effkit.selection.journal import journal
from effkit.selection.space import Space

SAMPLERS = ("tpe", "evolution", "random")
STARTUP = 6  # random proposals before TPE begins to learn
ATTEMPTS = 4  # proposals of the sampler, before a random walk takes its place
TRIES = 200  # random walks in search of a candidate that was not tried yet


@dataclass(frozen=True)
class Search:
    """space -> candidates, measured one after another.

    evaluate  technique -> Candidate
    storage   a journal file to go on from; None keeps nothing
    study     a name within the file
    identity  what else has to be the same for going on: the model's hash, say
    """

    space: Space
    evaluate: Callable[[Technique], Candidate]
    score: Score
    limits: Constraints = Constraints()
    timed: bool = False
    sampler: str = "tpe"
    seed: int = 0
    storage: Path | None = None
    study: str = "selection"
    identity: str = ""

    def __post_init__(self):
        require_choice("sampler", self.sampler, SAMPLERS)
        require_seed(self.seed)

    def run(self, trials: int) -> list[Candidate]:
        """Goes on until so many different candidates were measured, or refused, or there is none left."""
        require_int("trials", trials, 1)
        with quiet(), tqdm(total=trials, desc="selection", leave=False, delay=2) as bar:
            study = self._open()
            done = candidates(study)
            bar.update(len(done))
            try:
                while len(done) < trials and (proposal := self._propose(study, done)):
                    trial, technique = proposal
                    self._tell(study, trial, self.evaluate(technique))
                    done = candidates(study)
                    bar.update()
            except KeyboardInterrupt:
                kept = f"kept in {self.storage}: the same call goes on from there" if self.storage else "not kept"
                tqdm.write(f"stopped after {len(done)} of {trials} candidates; {kept}")
                raise
        return done[:trials]

    def _propose(self, study: optuna.Study, done: Sequence[Candidate]) -> tuple[Trial, Technique] | None:
        """The sampler's proposal; where it repeats itself, a random walk to something new, or None: nothing is left."""
        if not done:
            return self._claim(study), Identity()  # the unchanged model is the first candidate of every search
        tried = {candidate.key for candidate in done}
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))  # a killed process may have left one
        if self.sampler == "evolution" and not waiting:
            measured = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            study.enqueue_trial(child(measured, random.Random(f"{self.seed} {len(done)} child")))
        for attempt in range(ATTEMPTS):
            study.sampler = self._sampler(len(done), attempt)
            trial, technique = self._ask(study)
            if technique is not None and Candidate(technique).key not in tried:
                return trial, technique
            study.tell(trial, state=TrialState.FAIL)
        if (params := self._untried(tried, random.Random(f"{self.seed} {len(done)}"))) is None:
            return None
        study.enqueue_trial(params)
        trial, technique = self._ask(study)
        return (trial, technique) if technique is not None else None

    def _claim(self, study: optuna.Study) -> Trial:
        """A trial, marked as ours."""
        trial = study.ask()
        trial.set_user_attr("owner", f"{socket.gethostname()} {os.getpid()}")
        return trial

    def _ask(self, study: optuna.Study) -> tuple[Trial, Technique | None]:
        """A proposal; no technique where the settings proposed clash."""
        trial = self._claim(study)
        try:
            return trial, self.space.draw(lambda what, options: suggest(trial, what, options))
        except ValueError:
            return trial, None

    def _untried(self, tried: set[str], rng: random.Random) -> dict[str, object] | None:
        """A random walk to a candidate that was not tried."""
        for _ in range(TRIES):
            params: dict[str, object] = {}

            def choose(what: str, options: Sequence, params=params):
                i = rng.randrange(len(options))
                params[what] = i if ordered(options) else options[i]
                return options[i]

            with suppress(ValueError):  # settings that clash are no candidate
                if Candidate(self.space.draw(choose)).key not in tried:
                    return params
        return None

    def _tell(self, study: optuna.Study, trial: Trial, candidate: Candidate) -> None:
        if not candidate.refused:
            trial.set_user_attr("misses", list(self.limits.misses(candidate.readings, self.score).values()))
        trial.set_user_attr("candidate", encoded(candidate))
        self._finish(study, trial.number, candidate)

    def _finish(self, study: optuna.Study, trial: int, candidate: Candidate | None) -> None:
        if candidate is None or candidate.refused:
            study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        else:
            study.tell(trial, costs(candidate.readings, self.score), skip_if_finished=True)

    def _open(self) -> optuna.Study:
        """The study, new or gone on with. Raises ValueError where the file holds another search of this name."""
        storage = journal(self.storage) if self.storage else None
        directions = [optuna.study.StudyDirection.MINIMIZE] * (3 if self.timed else 2)
        study = optuna.create_study(study_name=self.study, storage=storage, directions=directions, load_if_exists=True)
        digest = hashlib.sha256(f"{self.identity} {self.describe()}".encode()).hexdigest()
        if study.user_attrs.get("search", digest) != digest:
            how = "choose another name for the study, or delete the file"
            raise ValueError(f"the study {self.study!r} in {self.storage} is of another model, space or limits; {how}")
        study.set_user_attr("search", digest)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if abandoned(trial):
                measured = trial.user_attrs.get("candidate")
                self._finish(study, trial.number, decoded(measured) if measured else None)
        return study

    def describe(self) -> str:
        """All that a proposal depends on, as text."""
        parts = {name: dict(settings) for name, settings in self.space.techniques.items()}
        missing = sorted(trait.name for trait in self.space.missing)
        return json.dumps([parts, self.space.longest, missing, repr(self.limits), self.timed, self.sampler, self.seed])

    def _sampler(self, done: int, attempt: int) -> optuna.samplers.BaseSampler:
        seed = random.Random(f"{self.seed} {done} {attempt}").getrandbits(31)
        constraints = (lambda trial: trial.user_attrs["misses"]) if self.limits.count else None
        if self.sampler != "tpe":
            return optuna.samplers.RandomSampler(seed)
        return optuna.samplers.TPESampler(
            n_startup_trials=STARTUP, multivariate=True, group=True, seed=seed, constraints_func=constraints
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna announces each study and trial, and which of the options used may change; as it was, afterwards."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", "`constraints_func` has been deprecated", FutureWarning)  # Optuna 4 needs it
        try:
            yield
        finally:
            optuna.logging.set_verbosity(before)


def suggest(trial: Trial, what: str, options: Sequence) -> object:
    """One of the options. Numbers in order are suggested by their place, so that the sampler knows neighbours."""
    if ordered(options):
        return options[trial.suggest_int(what, 0, len(options) - 1)]
    return trial.suggest_categorical(what, list(options))


def ordered(options: Sequence) -> bool:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in options)
    return numbers and list(options) == sorted(options)


def candidates(study: optuna.Study) -> list[Candidate]:
    """What the journal holds, in the order of the trials, each technique once."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL))
    found = [decoded(t.user_attrs["candidate"]) for t in trials if "candidate" in t.user_attrs]
    return list({candidate.key: candidate for candidate in found}.values())


def encoded(candidate: Candidate) -> dict:
    readings = {name: asdict(reading) for name, reading in candidate.readings.items()}
    technique = recipe.to_json(candidate.technique)
    return {"recipe": technique, "readings": readings, "refused": candidate.refused, "screened": candidate.screened}


def decoded(data: dict) -> Candidate:
    """A reading from a journal was measured then, not now: it is recorded. What was counted stays as it is."""
    then = {name: Reading(**reading) for name, reading in data["readings"].items()}
    now = {name: r if r.provenance == "counted" else replace(r, provenance="recorded") for name, r in then.items()}
    return Candidate(catalog.load_recipe(data["recipe"]), now, data["refused"], data["screened"])


def abandoned(trial: FrozenTrial) -> bool:
    """Whether the process that works on a trial is gone. One on another host is given the benefit of the doubt."""
    host, _, pid = trial.user_attrs.get("owner", "").rpartition(" ")
    if host not in ("", socket.gethostname()):
        return False
    return int(pid or -1) == os.getpid() or not _alive(int(pid or -1))


def _alive(pid: int) -> bool:
    if pid < 0 or os.name == "nt":  # os.kill ends the process there; a shared study wants another storage anyway
        return False
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # another user's, and alive
    return True
