"""Chapter 08. Speculative decoding: guess cheaply, verify at once, and keep the distribution.

verify       what stays of a proposal: rejection sampling, in a line and in a tree
speculate    draft and verify; Speculative, speculative_generate
draft        what is asked of a draft, what it shares with the target
law          tokens a pass, speed-up, the best gamma, and one that adapts
lookup       PromptLookup: the text's own repetitions as draft
self_draft   EarlyExit: the target's first layers as draft
heads        Medusa: heads on the target's last state, trained; a tree of what they guess
eagle        Eagle: a block, trained, that predicts the target's states
"""

from effkit.core.showcase import Exhibit, Showcase
from effkit.speculative.eagle import Eagle
from effkit.speculative.heads import Medusa
from effkit.speculative.lookup import PromptLookup
from effkit.speculative.self_draft import EarlyExit
from effkit.speculative.speculate import Speculative, speculative_generate

__all__ = ["SHOWCASE", "Eagle", "EarlyExit", "Medusa", "PromptLookup", "Speculative", "speculative_generate"]

SHOWCASE = Showcase(
    "speculative", (Exhibit("gpt-small", PromptLookup, work="decode"), Exhibit("gpt-small", Speculative, work="decode"))
)
