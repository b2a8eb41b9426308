"""Medusa: heads on the target's last state that guess the tokens behind the next one.

Problem   A draft is a second decoder: it has to be found and held, and it runs once a proposal.
Idea      The state h at a token, from which the target guesses the next one, knows something of those behind it, too.
          Head k, counted from 0, makes h + silu(W_k h) of it, from which the target's own output layer reads off the
          token k + 2 places after the state's own. W_k begins at zero, so that every head begins with the target's
          guess at the place before. The heads' best guesses are combined into a tree, all of it at once.
Exact     The tree follows from the text so far, so that its nodes are certain, q = 1: each is accepted with probability
          p(x), and the proof in verify.py covers every sampler. The paper keeps whatever is typical instead, x with
          p(x) > min(epsilon, delta exp(-entropy of p)): that keeps more, and the text is no longer the target's.
Cost      A d x d matrix a head, the output layer over a row a head, and the target over all nodes of the tree.
Limit     No head knows what the others guess: of two possible continuations, the tree also holds the mixtures.
Left out  An output layer of each head's own; training the target along (Medusa-2); its own text to train on.
Source    Cai et al. 2024, arXiv:2401.10774, sections 2.1.1 (heads), 2.3.1 (typical acceptance), 2.3.3 (sparse trees); eq. 1
          (loss).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.core.checkpoint import stored
from effkit.core.checks import require_float, require_int, require_seed
from effkit.core.report import Reading
from effkit.core.surgery import note
from effkit.core.task import Batch, Task
from effkit.core.technique import Paper, Technique, Trait, evaluating, kept_random_state
from effkit.core.training import Loss, Schedule, fit
from effkit.speculative.draft import tensor_bytes, vocabulary
from effkit.speculative.speculate import GUESSES, Proposer, Proposing, Seen
from effkit.speculative.tree import certain, check_branching, check_ranks
from effkit.speculative.verify import Proposal

DECAY = 0.8  # what a head counts in the loss, over the one before it
Choices = tuple[int, ...]  # a node of the tree: which of the first head's guesses, which of the second's, ...
SHOWN = ("features", "logits", "embedding", "running")
FEATURES = Trait("a decoder that shows its features", lambda model: all(hasattr(model, name) for name in SHOWN))


def guess(states: Float[Tensor, "*b d"], head: nn.Module) -> Float[Tensor, "*b d"]:
    """What a head makes of the target's states, for the target's output layer."""
    return states + F.silu(head(states))


def cartesian(branching: Choices) -> tuple[Choices, ...]:
    """All combinations of branching[k] guesses of each head k, parents first."""
    return tuple(path for depth in range(len(branching)) for path in product(*map(range, branching[: depth + 1])))


def likeliest(accuracy: Float[Tensor, "heads ranks"], branching: Choices, nodes: int) -> tuple[Choices, ...]:
    """The nodes of that tree which are most often right, were heads right independently of each other. No node is likelier
    than its parent, so that what is taken is a tree. accuracy: how often each guess of each head is the token."""
    chance = {path: prod(accuracy[k, i].item() for k, i in enumerate(path)) for path in cartesian(branching)}
    return tuple(sorted(sorted(chance, key=lambda path: -chance[path])[:nodes], key=len))


def parents_of(paths: tuple[Choices, ...]) -> Int[Tensor, " g"]:
    places = {path: i for i, path in enumerate(paths)}
    return torch.tensor([places.get(path[:-1], -1) for path in paths])


def guesses(
    target: Any, heads: Iterable[nn.Module], ids: Int[Tensor, "b n"]
) -> Iterator[tuple[Float[Tensor, "b m vocab"], Int[Tensor, "b m"]]]:
    """Of each head the logits at every token, and the tokens they are about."""
    with torch.no_grad():
        states = target.features(ids)
    for k, head in enumerate(heads):
        yield target.logits(guess(states[:, : -k - 2], head)), ids[:, k + 2 :]


def head_loss(target: nn.Module) -> Loss:
    """(heads, windows of text) -> the sum of the heads' cross-entropies in nats, head k's counting DECAY^k."""

    def loss(heads: Any, batch: Batch) -> Tensor:
        each = [F.cross_entropy(logits.float().transpose(1, 2), tokens) for logits, tokens in guesses(target, heads, batch[0])]
        return sum(DECAY**k * one for k, one in enumerate(each))  # type: ignore[return-value]

    return loss


@torch.no_grad()
def accuracies(target: nn.Module, heads: Any, texts: Iterable[Batch], ranks: int) -> Float[Tensor, "heads ranks"]:
    """How often the token is a head's best guess, its second, and so on."""
    hits = lambda logits, tokens: (logits.topk(ranks).indices == tokens[..., None]).flatten(0, 1).float().mean(0)  # noqa: E731
    return torch.stack([torch.stack([hits(*pair) for pair in guesses(target, heads, ids)]) for ids, _ in texts]).mean(0)


def train_beside(
    target: nn.Module, draft: nn.Module, task: Task, schedule: Schedule, loss: Loss, *, seed: int, **settings
) -> list[float]:
    """Trains a draft on task.train while the target stays as it is, gradients included; the loss of each step.

    seed   of the windows' order, added to the task's own;  settings   as in fit
    """
    train = replace(task.train, seed=task.train.seed + seed)  # type: ignore[union-attr, type-var]
    learning = [p for p in target.parameters() if p.requires_grad]
    try:
        with kept_random_state(), evaluating(target.requires_grad_(False)):
            return fit(draft, replace(task, train=train), schedule, loss=loss, **settings)
    finally:
        draft.zero_grad(set_to_none=True)
        for p in learning:
            p.requires_grad_(True)


class Candidates(Proposer):
    """Proposes the tree that the heads make of the last state that was seen; nothing before one was."""

    def __init__(self, target: Any, heads: Any, paths: tuple[Choices, ...]):
        self.target, self.heads, self.parents = target, heads, parents_of(paths)
        self.head, self.rank = torch.tensor([(len(path) - 1, path[-1]) for path in paths]).T
        self.state: Float[Tensor, " d"] | None = None

    def observe(self, seen: Seen) -> None:
        if seen.features is not None and len(seen.kept):
            self.state = seen.features[seen.kept[-1]]

    def __call__(self, ids, most, sampler, rng):
        nodes = int((self.head < most).sum())
        if self.state is None or not nodes:
            return Proposal(ids[0, :0])
        states = torch.stack([guess(self.state, head) for head in self.heads])
        best = self.target.logits(states[None])[0].topk(int(self.rank.max()) + 1).indices
        return certain(best[self.head[:nodes], self.rank[:nodes]], self.parents[:nodes])


@stored
class MedusaDecoding(Proposing):
    """With heads on the decoder's own states.

    width   of the states;  paths   the nodes of the tree that is proposed, parents first
    """

    def __init__(self, width: int, paths: tuple[Choices, ...]):
        super().__init__(max(map(len, paths)))
        self.paths: tuple[Choices, ...] = tuple(map(tuple, paths))
        self.heads = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(self.gamma))

    def numbers(self) -> dict:
        return {"width": self.heads[0].in_features, "paths": [list(path) for path in self.paths]}

    def pruned(self, paths: tuple[Choices, ...]) -> "MedusaDecoding":
        """The same heads, as many as these nodes need."""
        new = MedusaDecoding(self.heads[0].in_features, paths)  # type: ignore[arg-type]
        new.heads = self.heads[: new.gamma]
        return new

    def proposer(self, model: nn.Module, capacity: int) -> Proposer:
        return Candidates(model, self.heads, self.paths)


@dataclass(frozen=True, kw_only=True)
class TrainedBeside(Technique):
    """What techniques have in common whose draft learns from the target, which stays as it is.

    epochs   passes over task.train; 0 leaves the draft as it begins;  steps   a number of training steps instead
    seed     of what the draft begins with, and of the windows' order, added to the task's own
    """

    epochs: int = 1
    steps: int | None = None
    lr: float = 3e-3
    seed: int = 0

    needs = GUESSES | {FEATURES}

    def __post_init__(self):
        require_int("epochs", self.epochs, 0, hint="0 trains nothing")
        if self.steps is not None:
            require_int("steps", self.steps, 0, hint="0 trains nothing")
        require_float("lr", self.lr, 0.0, open_low=True)
        require_seed(self.seed)

    def train(self, model: nn.Module, draft: nn.Module, task: Task, loss: Loss, *, ahead: int) -> None:
        """Trains a draft that looks so many tokens ahead. Raises ValueError where task.train has none so far apart."""
        if self.steps == 0 or (self.steps is None and self.epochs == 0):
            return
        who = type(self).__name__
        task.require("train", by=self)
        if (tokens := task.train.at(0)[0].shape[1]) <= ahead:  # type: ignore[union-attr]
            raise ValueError(f"{who} looks {ahead} tokens ahead, and task.train has windows of {tokens}: give it longer ones")
        steps = self.epochs * len(task.train) if self.steps is None else self.steps  # type: ignore[arg-type]
        train_beside(model, draft, task, Schedule(steps, self.lr), loss, seed=self.seed, label=who)

    def claim(self, model: nn.Module) -> Reading:
        """Bytes of what was added, over the model's own."""
        own, both = (tensor_bytes(model, without=without) for without in (model.decoding, None))  # type: ignore[arg-type]
        return Reading(both / own - 1, "of the target's bytes", "counted", better="lower")


@dataclass(frozen=True)
class Medusa(TrainedBeside):
    """The decoder proposes what heads on its last state guess, and verifies it.

    heads      how many tokens behind the next one are guessed
    branching  how many guesses of each head are combined into a tree
    nodes      of that tree only so many: those likeliest to be right, by how often each guess is on task.calib
    """

    heads: int = 3
    branching: tuple[int, ...] = (4, 2, 1)
    nodes: int | None = None

    paper = Paper("Cai et al.", 2024, "Medusa: simple LLM inference acceleration framework with multiple decoding heads",
                  "arXiv:2401.10774", "section 2.1.1, eq. 1")  # fmt: skip

    def __post_init__(self):
        require_int("heads", self.heads, 1, 8, hint="what lies further ahead is hardly ever guessed")
        check_branching(self.branching, self.heads)
        if self.nodes is not None:
            require_int("nodes", self.nodes, 1, len(cartesian(self.branching)), hint="the tree of `branching` has no more")
        super().__post_init__()

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        check_ranks(self.branching, vocabulary(model))
        task.require(*(("calib",) if self.nodes else ()), by=self)
        state, paths = state_of(model), cartesian(self.branching)
        whole = MedusaDecoding(state.shape[-1], paths).to(state.device, state.dtype)
        for parameter in whole.parameters():
            nn.init.zeros_(parameter)
        self.train(model, whole.heads, task, head_loss(model), ahead=self.heads + 1)
        if self.nodes is not None:
            found = accuracies(model, whole.heads, task.calib, max(self.branching))  # type: ignore[arg-type]
            paths = likeliest(found, self.branching, self.nodes)
        model.decoding = whole.pruned(paths).train(model.training)
        note(model, "decoding", f"{self.heads} heads propose {len(paths)} tokens", "Medusa")
        return model


@torch.no_grad()
def state_of(target: Any) -> Float[Tensor, "1 1 d"]:
    """A state, for its width, dtype and device."""
    with evaluating(target):
        return target.features(torch.zeros(1, 1, dtype=torch.long, device=next(target.parameters()).device))
