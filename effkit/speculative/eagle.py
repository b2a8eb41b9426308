"""EAGLE: a draft of one block that reads and predicts the target's states.

Problem   A draft is often wrong because it knows little: it sees tokens, where the target has worked out what they mean.
          Heads on the target's state (heads.py) know much, but not which token was drawn from it.
Idea      The target's state f_i at token i is easier to continue than the text. A block over [embedding of token i + 1;
          f_i] predicts f_{i+1}, from which the target's own output layer reads off token i + 2. Behind the end of the
          text it goes on with its own predictions, a token at a time.
Loss      The smooth L1 distance between predicted and true states, plus 0.1 times the cross-entropy to the target's own
          distribution. The target makes all labels, so that any text will do, and what it wrote itself does best.
Exact     Tokens are drawn from q, in a tree without putting back, and verify.py is exact for both. Greedily, they are
          the likeliest.
Cost      2 d^2 weights and a block to hold. To run, for each level, that block and the output layer: with many tokens
          and a small target, most of it (49,152 rows are a fifth of SmolLM2). A draft that chooses from the frequent
          tokens reads fewer rows; for all others q is 0, and verification makes up for it (Zhao et al. 2025).
Left out  Noise on the states in training; training on predicted states; trees that grow where q is sure (EAGLE-2).
Source    Li et al. 2024, arXiv:2401.15077, sections on drafting and training; Zhao et al. 2025, arXiv:2502.14856.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from effkit.core.checkpoint import load, stored
from effkit.core.checks import require_int
from effkit.core.generation import Cache, NoCache, Rope
from effkit.core.paths import data_dir
from effkit.core.surgery import dense_weight, note
from effkit.core.task import Batch, Task
from effkit.core.technique import Paper
from effkit.core.training import Loss
from effkit.speculative.draft import vocabulary
from effkit.speculative.heads import TrainedBeside, state_of
from effkit.speculative.speculate import Proposer, Proposing, Seen
from effkit.speculative.tree import Branching, Growing, check_branching, check_ranks, several
from effkit.speculative.verify import Proposal
from effkit.zoo.build import build
from effkit.zoo.gpt import Block, GPTConfig

WEIGHT = 0.1  # of the cross-entropy
MOST_TOKENS = 2**20


@stored
class EagleHead(nn.Module):
    """Predicts the target's next state. To what runs blocks and makes caches it is a decoder of one block.

    frequent   how many tokens it chooses from; None: all;  numbers   a GPTConfig's
    """

    def __init__(self, frequent: int | None = None, **numbers):
        super().__init__()
        self.config = c = GPTConfig(**numbers | {"layers": 1})
        self.fuse = nn.Linear(2 * c.d_model, c.d_model, bias=False)
        self.blocks = nn.ModuleList([Block(c)])
        self.norm = nn.Identity()  # the states that it predicts are normalized
        self.rope = Rope(c.head_dim, c.rope_theta)
        self.tokens: Int[Tensor, " frequent"] | None
        self.register_buffer("tokens", torch.zeros(frequent, dtype=torch.long) if frequent else None)

    def numbers(self) -> dict:
        return {"frequent": None if self.tokens is None else len(self.tokens), **asdict(self.config)}

    def forward(
        self, target: Any, ids: Int[Tensor, "b n"], states: Float[Tensor, "b n d"], cache: Cache | None = None,
        parents: Int[Tensor, " n"] | None = None,
    ) -> Float[Tensor, "b n d"]:  # fmt: skip
        """Of each token, given the state before it, the state that the target will have there."""
        cache = NoCache(self.rope) if cache is None else cache
        x = self.fuse(torch.cat((target.embedding(ids), states), dim=-1))
        cache.advance(ids.shape[1], parents, device=x.device, dtype=x.dtype)
        return target.running(self, x, cache)

    def reader(self, target: Any) -> Callable[[Tensor], Tensor]:
        """From states to the logits of the tokens that it chooses from: the target's output layer, or those rows of it."""
        if self.tokens is None:
            return target.logits
        rows = dense_weight(target.embedding if target.head is None else target.head)[self.tokens].detach()
        part = nn.Linear(rows.shape[1], len(rows), bias=False, device="meta")
        part.weight = nn.Parameter(rows, requires_grad=False)
        return lambda states: target.running.logits(SimpleNamespace(head=part), states)


def eagle_loss(
    target: Any, head: EagleHead, ids: Int[Tensor, "b n"], states: Float[Tensor, "b n d"]
) -> Float[Tensor, ""]:
    """How far the predicted states are from the true ones, and what is read off them from the target's distribution."""
    read = head.reader(target)
    guessed, wanted = head(target, ids[:, 1:], states[:, :-1]), states[:, 1:]
    p, log_q = read(wanted).float().softmax(-1), read(guessed).float().log_softmax(-1)
    return F.smooth_l1_loss(guessed.float(), wanted.float()) - WEIGHT * (p * log_q).sum(-1).mean()


def on_texts(target: Any) -> Loss:
    """The loss over windows of a text, whose states are computed at each step."""

    def loss(head: Any, batch: Batch) -> Tensor:
        with torch.no_grad():
            states = target.features(batch[0])
        return eagle_loss(target, head, batch[0], states)

    return loss


def fresh_head(target: Any, texts: Iterable[Batch] | None, *, frequent: int | None, seed: int, **sizes: int) -> EagleHead:
    """An untrained head of the target's dtype, device and widths but for these sizes, such as d_ff=512, for the tokens
    most frequent in the texts."""
    state = state_of(target)
    numbers = {**asdict(target.config), "d_model": state.shape[-1], "frequent": frequent, **sizes}
    head: Any = build("EagleHead", tuple(numbers.items()), seed=seed).to(state.device, state.dtype)
    if frequent is not None:
        counts: Any = sum(torch.bincount(ids.flatten(), minlength=vocabulary(target)) for ids, _ in texts or ())
        head.tokens.copy_(counts.argsort(descending=True, stable=True)[:frequent].sort().values)
    return head


class Drafter(Growing):
    """Goes on from the target's last state with predicted ones; proposes nothing before it has seen all states before
    the last token."""

    def __init__(self, target: Any, head: EagleHead, branching: Branching | None, *, capacity: int):
        super().__init__(branching)
        self.target, self.head, self.read = target, head, head.reader(target)
        self.cache, self.committed = target.kv.new(head, capacity=capacity), 0
        self.states: Any = None  # a row a token of the text

    def observe(self, seen: Seen) -> None:
        """Takes the states of tokens that are now part of the text, and that it does not know yet."""
        features: Any = seen.features
        known = features[:0] if self.states is None else self.states
        self.states = torch.cat((known, features[seen.kept[len(known) - seen.start :]]))

    def __call__(self, ids, most, sampler, rng):
        if self.states is None or not 0 < len(self.states) == ids.shape[1] - 1:
            return Proposal(ids[0, :0])
        self.ahead = self.states[:0]  # what is predicted behind the text and behind each node
        return super().__call__(ids, most, sampler, rng)

    def behind(self, ids, tokens, parents, last):
        """The tree is fed anew at each level: a pass can branch from what the cache held before, but not inside of it."""
        self.cache.truncate(self.committed)
        start, self.committed = self.cache.length, len(self.states)
        fed = torch.cat((ids[0, 1:], tokens))[start:]
        states = torch.cat((self.states[start:], self.ahead[parents + 1]))  # of each token the one before it
        trunk = len(fed) - len(tokens)
        branches = self.branching is not None and len(tokens) > 0
        tree = torch.cat((torch.arange(trunk, device=ids.device) - 1, parents + trunk)) if branches else None
        made = self.head(self.target, fed[None], states[None], self.cache, tree)[0]
        self.ahead = made[trunk - 1 :] if trunk else torch.cat((self.ahead[:1], made))
        return self.read(self.ahead[None, -last:])[0]

    def choose(self, logits, width, sampler, rng):
        """Among the tokens that it knows."""
        if self.head.tokens is None:
            return super().choose(logits, width, sampler, rng)
        if sampler.temperature == 0:
            return self.head.tokens[super().choose(logits, width, sampler, rng)[0]], []
        q = self.spread(sampler.probabilities(logits))
        return several(q, width, rng).flatten(), [q]

    def spread(self, q: Float[Tensor, "n frequent"]) -> Float[Tensor, "n vocab"]:
        """The same distribution over all tokens."""
        return q.new_zeros(len(q), vocabulary(self.target)).index_copy_(1, self.head.tokens, q)  # type: ignore[arg-type]


@stored
class EagleDecoding(Proposing):
    """With a head, which it holds."""

    def __init__(self, gamma: int, branching: Branching | None = None):
        super().__init__(gamma)
        self.branching = branching
        self.head: nn.Module = nn.Identity()

    def proposer(self, model: nn.Module, capacity: int) -> Proposer:
        return Drafter(model, self.head, self.branching, capacity=capacity)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Eagle(TrainedBeside):
    """The decoder proposes what a block predicts of its states, and verifies it.

    gamma      tokens that are proposed in a line, or a tree's levels
    branching  how many tokens follow each node of a level, as in (4, 2, 1, 1); None: a line
    frequent   the draft chooses from the tokens most frequent in task.train, so many; None: from all
    head       the name of a shipped one, data/NAME.safetensors: nothing is trained, and it says what it chooses from
    """

    gamma: int = 4
    branching: Branching | None = None
    frequent: int | None = None
    head: str = ""

    paper = Paper("Li et al.", 2024, "EAGLE: speculative sampling requires rethinking feature uncertainty",
                  "arXiv:2401.15077", "L_reg + 0.1 L_cls")  # fmt: skip

    def __post_init__(self):
        require_int("gamma", self.gamma, 1, hint="it is how many tokens are proposed at a time")
        if self.branching is not None:
            check_branching(self.branching, self.gamma)
        if self.frequent is not None:
            require_int("frequent", self.frequent, 1, MOST_TOKENS, hint="None: all tokens")
        learning = [f.name for f in fields(self) if f.name in ("frequent", "epochs", "steps", "lr", "seed") and getattr(self, f.name) != f.default]
        if self.head and learning:
            raise ValueError(f"{' and '.join(learning)} would change nothing about head={self.head!r}, which has learned: leave one or the other out")
        super().__post_init__()

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        tokens = vocabulary(model)
        if self.frequent is not None and self.frequent > tokens:
            raise ValueError(f"frequent must be at most {tokens}, the vocabulary, got {self.frequent}: None chooses from all")
        check_ranks(self.branching or (1,), self.frequent or tokens)
        head = shipped_head(self.head, model) if self.head else self.trained(model, task)
        note(model, "decoding", f"a block drafts {self.gamma} tokens ahead", "Eagle")
        return drafting(model, head, self.gamma, self.branching)

    def trained(self, model: nn.Module, task: Task) -> EagleHead:
        if self.frequent is not None:
            task.require("train", by=self)
        head = fresh_head(model, task.train, frequent=self.frequent, seed=self.seed)
        self.train(model, head, task, on_texts(model), ahead=1)
        return head


def drafting(model: nn.Module, head: EagleHead, gamma: int, branching: Branching | None = None) -> nn.Module:
    """The decoder, generating with this head from now on."""
    model.decoding = EagleDecoding(gamma, branching)
    model.decoding.head = head
    model.decoding.train(model.training)
    return model


def shipped_head(name: str, model: Any) -> EagleHead:
    """Raises ValueError where the file holds something else, or a head for states of another width or other tokens."""
    head, state = load(data_dir() / f"{name}.safetensors"), state_of(model)
    found = (head.config.d_model, head.config.vocab_size) if isinstance(head, EagleHead) else type(head).__name__
    if found != (wanted := (state.shape[-1], vocabulary(model))):
        raise ValueError(f"head {name!r} must predict states of a width and a vocabulary of {wanted}, got {found}: leave `head` empty to train one")
    return head.to(state.device, state.dtype)  # type: ignore[return-value]
