"""Result cache: a question that was asked before is answered from memory.

Problem   Many requests are repeats, word for word or nearly, and each costs a whole generation.
Idea      Keep the texts that were generated. The same prompt, letter for letter, greedily continued, has the same answer:
          exact. A prompt that is close to a known one in the model's own features may well have the same answer: semantic.
Cost      The semantic cache lies. Closeness is about what a prompt is like, and one letter may change what is right: so
          the share of its answers that are wrong has to be measured, at every threshold, and set against what is saved.
Left out  Answers that age; users who must not see one another's.
Source    Bang 2023, doi:10.18653/v1/2023.nlposs-1.24 (GPTCache).
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effkit.core.checkpoint import stored
from effkit.core.checks import require_float, require_int
from effkit.core.generation import Autoregressive, Sampler
from effkit.core.report import Reading
from effkit.core.surgery import note
from effkit.core.task import Task
from effkit.core.technique import Paper, Technique
from effkit.core.traits import DECODER, UNANSWERED


@torch.no_grad()
def meaning(model: nn.Module, ids: Int[Tensor, "1 n"]) -> Float[Tensor, " d"]:
    """A prompt as a point on a sphere: the mean of the model's features over its tokens."""
    mean = model.features(ids)[0].float().mean(0)  # type: ignore[operator]
    return mean / mean.norm()


def simulated(
    points: Float[Tensor, "n d"], answers: Sequence[tuple[int, ...]], threshold: float
) -> tuple[Bool[Tensor, " n"], Bool[Tensor, " n"]]:
    """Which of a stream of prompts a semantic cache answers from memory, and which of these wrongly: where the nearest
    prompt so far that had to be computed is at least `threshold` close (cosine), its answer is given."""
    hits, lies = torch.zeros(len(points), dtype=torch.bool), torch.zeros(len(points), dtype=torch.bool)
    known: list[int] = []
    for i, point in enumerate(points):
        close = points[known] @ point
        if known and close.max() >= threshold:
            hits[i] = True
            lies[i] = answers[known[int(close.argmax())]] != answers[i]
        else:
            known.append(i)
    return hits, lies


@stored
class Remembering(nn.Module):
    """As a decoder's `decoding`: greedy texts are kept, the least recently used go first. What is drawn at random is
    generated anew each time, for a draw that always comes out the same is none."""

    def __init__(self, capacity: int, threshold: float | None):
        super().__init__()
        self.capacity, self.threshold = capacity, threshold
        self.inner: nn.Module = Autoregressive()
        self.known: OrderedDict[tuple, tuple[Tensor, Tensor | None]] = OrderedDict()
        self.weights: list[Tensor] = []  # of the model that wrote it
        self.state: list[tuple] = []  # and where and what they were then
        self.hits = self.asked = 0

    def __getstate__(self) -> dict:
        """A copy remembers nothing: techniques make copies to change them."""
        return self.__dict__ | {"known": OrderedDict(), "weights": [], "state": [], "hits": 0, "asked": 0}

    def forward(self, model: nn.Module, ids: Int[Tensor, "b n"], max_new_tokens: int, **settings) -> Int[Tensor, "b m"]:
        if settings.get("sampler", Sampler()).temperature != 0:
            return self.inner(model, ids, max_new_tokens, **settings)
        rows = [self._answer(model, row[None], max_new_tokens, settings)[0] for row in ids]
        longest = max(map(len, rows))
        return torch.stack([torch.cat((row, row[-1:].expand(longest - len(row)))) for row in rows])

    def _answer(self, model: nn.Module, ids: Int[Tensor, "1 n"], new: int, settings: dict) -> Int[Tensor, "1 m"]:
        self._forget_if_changed(model)
        asked = (new, str({k: v for k, v in settings.items() if k != "rng"}))
        key, point = (tuple(ids[0].tolist()), asked), None if self.threshold is None else meaning(model, ids)
        self.asked += 1
        found = key if key in self.known else self._near(point, asked)
        if found is None:
            text = self.inner(model, ids, new, **settings)
            self.known[key] = (text[:, ids.shape[1] :], point)
            if len(self.known) > self.capacity:
                self.known.popitem(last=False)
            return text
        self.hits += 1
        self.known.move_to_end(found)
        return torch.cat((ids, self.known[found][0]), dim=1)

    def _forget_if_changed(self, model: nn.Module) -> None:
        """Training, or a write into a weight, counts a version up; a cast or another `data` lies elsewhere, and never where the
        weights lay that were seen last, for they are held on to. A write through `weight.data` leaves no trace: whoever does
        that makes a new ResultCache."""
        weights = [*model.parameters(), *model.buffers()]
        if (state := [(t.data_ptr(), t.dtype, t._version) for t in weights]) != self.state:
            self.weights, self.state, self.known = [t.detach() for t in weights], state, OrderedDict()

    def _near(self, point: Tensor | None, asked: tuple) -> tuple | None:
        """The key of the closest prompt of the same request, if it is close enough."""
        alike = [(float(p @ point), k) for k, (_, p) in self.known.items() if k[1] == asked and p is not None and point is not None]
        closeness, key = max(alike, default=(-1.0, None), key=lambda pair: pair[0])
        return key if self.threshold is not None and closeness >= self.threshold else None


@dataclass(frozen=True)
class ResultCache(Technique):
    """The decoder keeps what it wrote, and gives it again when it is asked again.

    capacity    texts that are kept
    threshold   cosine from which another prompt counts as the same; None: only the very same prompt does
    """

    capacity: int = 128
    threshold: float | None = None

    needs = frozenset({DECODER})
    breaks = frozenset({UNANSWERED})
    paper = Paper("Bang", 2023, "GPTCache: an open-source semantic cache for LLM applications",
                  "doi:10.18653/v1/2023.nlposs-1.24")  # fmt: skip

    def __post_init__(self):
        require_int("capacity", self.capacity, 1)
        if self.threshold is not None:
            require_float("threshold", self.threshold, 0.0, 1.0, open_low=True, hint="it is a cosine; None takes the same prompt alone")

    def rewrite_(self, model: nn.Module, task: Task) -> nn.Module:
        if self.threshold is not None and not hasattr(model, "features"):
            raise ValueError(f"a threshold needs a model with `features`, as GPT has; {type(model).__name__} has none: leave it None")
        remembering = Remembering(self.capacity, self.threshold)
        remembering.inner = model.decoding  # type: ignore[assignment]
        model.decoding = remembering.train(model.training)
        note(model, "decoding", f"keeps {self.capacity} texts", "ResultCache")
        return model

    def claim(self, model: nn.Module) -> Reading:
        return Reading(model.decoding.capacity, "texts at most", "counted")  # type: ignore
