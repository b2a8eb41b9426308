"""Drafts made from the target itself.

Problem   A draft must speak the target's vocabulary and guess as it does. Where is one to be had?
Idea      A residual network is a sum, so that some of its blocks can be left out: the last ones, which leaves an early
          exit, or those that are missed least. The rest, with the last norm and the output layer, is a decoder already,
          and none of its tensors is new, so that it costs no memory (draft.py).
Choice    What a set of blocks is worth is the acceptance of what it proposes, the mean of sum min(p, q) on some texts.
          There are too many sets to try them all, where a target is deep; a walk begins with the early exit, and puts
          one block back for another as long as acceptance grows.
Cost      The blocks that are left out did something, and no other has learned to do without them: of SmolLM2's first
          half .10 is accepted, of its first 25 blocks of 30 .35 (`effkit study decoding`, temperature .8). gpt-target does not
          miss a sixth of its own, well chosen (.999): blocks that joined late and learned little.
Training  brings some of it back, and chapter 03 does it: Speculative(draft=Distill(student=EarlyExit(0.3))). What has learned
          is then the draft's own, and held beside the target.
Left out  Leaving out only an attention or a feed-forward (Zhang et al., who search by Bayesian optimization for the best
          speed, and stop a draft where it is unsure); training with layers dropped and a loss at every exit (Elhoushi et
          al.); keys and values of the first layers, which target and early exit could share.
Source    Zhang et al. 2023, arXiv:2309.08168 (self-speculation, section 3.3); Elhoushi et al. 2024, arXiv:2404.16710 (early
          exit).
"""

import copy
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, is_dataclass, replace
from itertools import combinations
from math import comb

import torch
from torch import nn

from effkit.core.checks import require_float, require_int, require_seed
from effkit.core.report import Reading
from effkit.core.surgery import note
from effkit.core.task import Batch, Task
from effkit.core.technique import Paper, Technique, evaluating
from effkit.core.traits import DECODER
from effkit.speculative.verify import overlap


@torch.no_grad()
def acceptance(target: nn.Module, draft: nn.Module, texts: Iterable[Batch]) -> float:
    """How often a token that the draft draws is accepted, at temperature 1: the mean of sum min(p, q) over all places."""
    with evaluating(target), evaluating(draft):
        p_and_q = ([model(ids).float().softmax(-1) for model in (target, draft)] for ids, _ in texts)
        return torch.cat([overlap(p, q).flatten() for p, q in p_and_q]).mean().item()


def least_missed(
    worth: Callable[[tuple[int, ...]], float], blocks: int, skip: int, *, trials: int, seed: int
) -> tuple[int, ...]:
    """Which `skip` of the blocks to leave out so that `worth` of these is largest: the best of all choices where there are
    at most so many `trials`, else of a walk that begins with the last ones and swaps one at a time."""
    if comb(blocks, skip) <= trials:
        return max(combinations(range(blocks), skip), key=worth)
    rng, best = random.Random(seed), tuple(range(blocks - skip, blocks))
    most = worth(best)
    for _ in range(trials - 1):
        back, out = rng.choice(best), rng.choice([i for i in range(blocks) if i not in best])
        tried = tuple(sorted({*best, out} - {back}))
        if (value := worth(tried)) > most:
            best, most = tried, value
    return best


def keep_blocks(model: nn.Module, kept: Sequence[int]) -> nn.Module:
    """The decoder with these of its blocks, in their order."""
    model.blocks = nn.ModuleList([model.blocks[i] for i in kept])  # type: ignore[index, misc]
    model.config = replace(model.config, layers=len(kept))  # type: ignore[type-var]
    return model


def view(model: nn.Module) -> nn.Module:
    """The same model once more, whose parts can be replaced without touching the first."""
    other = copy.copy(model)
    other._modules = dict(model._modules)
    return other


def count_blocks(model: nn.Module, by: str) -> int:
    """Raises ValueError where it cannot be said what the model's blocks are."""
    blocks, config = getattr(model, "blocks", None), getattr(model, "config", None)
    if not (isinstance(blocks, nn.ModuleList) and is_dataclass(config) and hasattr(config, "layers")):
        raise ValueError(f"{by} needs a decoder with `blocks` and `config.layers`, as GPT has; {type(model).__name__} has none")
    return len(blocks)


def check_named(skip: tuple[int, ...], blocks: int) -> tuple[int, ...]:
    if len(set(skip)) < len(skip) or not set(skip) < set(range(blocks)):
        how = "a share, such as 0.5, has them chosen"
        raise ValueError(f"skip must name different blocks from 0 to {blocks - 1}, and leave one, got {skip!r}: {how}")
    return skip


def blocks_left(model: nn.Module) -> Reading:
    return Reading(len(model.blocks), "blocks", "counted", better="lower")  # type: ignore[arg-type]


@dataclass(frozen=True)
class EarlyExit(Technique):
    """The decoder without its last blocks.

    depth   share of the blocks that stay, at least one
    """

    depth: float = 0.5

    needs = frozenset({DECODER})
    paper = Paper("Elhoushi et al.", 2024, "LayerSkip: enabling early exit inference and self-speculative decoding",
                  "arXiv:2404.16710", "section 4")  # fmt: skip

    def __post_init__(self):
        require_float("depth", self.depth, 0.0, 1.0, open_low=True, hint="1 keeps every block")

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        blocks = count_blocks(model, "EarlyExit")
        kept = max(1, round(self.depth * blocks))
        note(model, "blocks", f"{blocks} -> {kept}", "EarlyExit")
        return keep_blocks(model, range(kept))

    def claim(self, model: nn.Module) -> Reading:
        return blocks_left(model)


@dataclass(frozen=True)
class SkipLayers(Technique):
    """The decoder without the blocks that are missed least.

    skip      which blocks, counted from 0; or how large a share of them, which are then chosen by acceptance on task.calib
    trials    choices that are tried;  examples   windows of task.calib that they are tried on
    seed      of the walk from choice to choice
    """

    skip: float | tuple[int, ...] = 0.5
    trials: int = 32
    examples: int = 16
    seed: int = 0

    needs = frozenset({DECODER})
    paper = Paper("Zhang et al.", 2023, "Draft & verify: lossless large language model acceleration via self-speculative decoding",
                  "arXiv:2309.08168", "section 3.3")  # fmt: skip

    def __post_init__(self):
        if not isinstance(self.skip, tuple):
            require_float("skip", self.skip, 0.0, 1.0, open_low=True, open_high=True, hint="a share of the blocks; or name them: skip=(3, 4)")
        require_int("trials", self.trials, 1, 10_000, hint="each is a pass over the examples")
        require_int("examples", self.examples, 1)
        require_seed(self.seed)

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        blocks = count_blocks(model, "SkipLayers")
        skip = check_named(self.skip, blocks) if isinstance(self.skip, tuple) else self.chosen(model, task, self.skip, blocks)
        note(model, "blocks", f"{blocks} -> {blocks - len(skip)}, without {', '.join(map(str, skip)) or 'none'}", "SkipLayers")
        return keep_blocks(model, [i for i in range(blocks) if i not in skip])

    def chosen(self, model: nn.Module, task: Task, share: float, blocks: int) -> tuple[int, ...]:
        skip = min(blocks - 1, max(1, round(share * blocks)))
        if skip == 0:  # of one block
            return ()
        few = task.few(self.examples, by=self)

        def worth(tried: tuple[int, ...]) -> float:
            draft = keep_blocks(view(model), [i for i in range(blocks) if i not in tried])
            return acceptance(model, draft, few.calib)  # type: ignore[arg-type]

        return least_missed(worth, blocks, skip, trials=self.trials, seed=self.seed)

    def claim(self, model: nn.Module) -> Reading:
        return blocks_left(model)
