"""Chapter 08. Speculative decoding: guess cheaply, verify at once, and keep the distribution.

verify       what stays of a proposal: rejection sampling, in a line and in a tree
speculate    draft and verify; Speculative, speculative_generate
draft        what is asked of a draft, what it shares with the target
law          tokens a pass, speed-up, the best gamma, and one that adapts
lookup       PromptLookup: the text's own repetitions as draft
jacobi       Jacobi, Lookahead: the target's own guesses, refined, or read off as n-grams
self_draft   EarlyExit, SkipLayers: some of the target's layers as draft
tree         SpeculativeTree: a draft that branches
batch        speculative_batch: several texts in one pass
heads        Medusa: heads on the target's last state, trained; a tree of what they guess
eagle        Eagle: a block, trained, that predicts the target's states
"""

from effkit.core.showcase import Exhibit, Showcase
from effkit.speculative.batch import speculative_batch
from effkit.speculative.eagle import Eagle
from effkit.speculative.heads import Medusa
from effkit.speculative.jacobi import Jacobi, Lookahead
from effkit.speculative.lookup import PromptLookup
from effkit.speculative.self_draft import EarlyExit, SkipLayers
from effkit.speculative.speculate import Speculative, speculative_generate
from effkit.speculative.tree import SpeculativeTree

__all__ = [
    "SHOWCASE", "Eagle", "EarlyExit", "Jacobi", "Lookahead", "Medusa", "PromptLookup", "SkipLayers", "Speculative", "SpeculativeTree",
    "speculative_batch", "speculative_generate",
]  # fmt: skip

SHOWCASE = Showcase(
    "speculative", (Exhibit("gpt-small", PromptLookup, work="decode"), Exhibit("gpt-small", Speculative, work="decode"))
)
