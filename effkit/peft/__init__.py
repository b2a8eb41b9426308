"""Chapter 06. PEFT: adapting a large model by training a small one beside it.

ledger    what training must hold: weights, gradients, optimizer
lora      LoRA: a frozen base and two thin factors; over a quantized base, QLoRA
serving   merge, unmerge, strip; adapters in a file of their own
"""

from effkit.core.showcase import Exhibit, Showcase
from effkit.peft.ledger import memory_ledger
from effkit.peft.lora import LoRA
from effkit.peft.serving import load_adapters, merge, save_adapters, strip, unmerge

__all__ = ["SHOWCASE", "LoRA", "load_adapters", "memory_ledger", "merge", "save_adapters", "strip", "unmerge"]

SHOWCASE = Showcase("peft", (Exhibit("gpt-small", lambda: LoRA(rank=8, epochs=0), work="train", batch=8),))
