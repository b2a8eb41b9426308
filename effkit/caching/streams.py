"""A stream of requests: what a server is really asked, made anew from a seed.

Problem   Whether a prefix cache or a batch pays is decided by the requests: which begin alike, how long their answers
          are, when they come. Logs of real services are nobody's to ship.
Idea      Three kinds that beginnings are shared by, of the standard library's text: turns of chats with one system
          prompt, questions behind the same examples, edits of one file. Answers are of exponential length, so that a
          few are far longer than most. Arrivals are a Poisson process: gaps of exponential length.
Left out  That users answer what they were answered (a chat goes on with text of the library, whatever the model said),
          bursts, and the hours of the day.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from effkit.core.checks import require_float, require_int
from effkit.zoo.data import stdlib_text
from effkit.zoo.tokens import shipped_tokenizer


@dataclass(frozen=True)
class Request:
    """A prompt, how many tokens are asked for, and when, in seconds."""

    prompt: Sequence[int]
    new: int
    arrival: float = 0.0
    kind: str = ""


def stream(
    seed: int, n: int, *, rate: float = 1.0, sources: int = 6, again: float = 0.1, longest: int = 384, mean_new: int = 32,
    most_new: int = 128, texts: Sequence[str] | None = None, encode: Callable[[str], Sequence[int]] | None = None,
) -> list[Request]:  # fmt: skip
    """n requests, a third of each kind, in order of arrival; the same for the same seed.

    rate      arrivals a second
    sources   system prompts, headers of examples and files, so many each; the first are asked for more often
    again     share of requests that repeat one of the last sixteen prompts: somebody wants another answer
    longest   tokens of a prompt at most
    texts     what they are made of; None: the standard library's held-out modules
    encode    text to tokens; None: the shipped tokenizer
    """
    require_int("n", n, 0)
    require_int("sources", sources, 1)
    require_float("again", again, 0.0, 1.0)
    require_int("longest", longest, 16, hint="a prompt is a beginning and a question")
    require_int("mean_new", mean_new, 1)
    encode = encode or (lambda text: shipped_tokenizer().encode(text, add_special_tokens=False).ids)
    tokens = [token for text in (stdlib_text("val") if texts is None else texts) for token in encode(text)]
    rng = Random(seed)
    cut: Cut = lambda most: passage(tokens, rng, rng.randint(most // 4 + 1, most))  # noqa: E731
    kinds = {kind.__name__: [kind(cut, rng, longest) for _ in range(sources)] for kind in (chats, few_shot, edits)}
    now, requests = 0.0, list[Request]()
    for _ in range(n):
        now += rng.expovariate(1.0)
        new = min(most_new, 1 + int(rng.expovariate(1.0) * mean_new))
        if requests and rng.random() < again:
            requests.append(replace(rng.choice(requests[-16:]), new=new, arrival=now))
        else:
            kind = rng.choice(list(kinds))
            source = kinds[kind][int(sources * rng.random() ** 2)]
            requests.append(Request(tuple(next(source)), new, now, kind))
    return paced(requests, rate)


def paced(requests: Sequence[Request], rate: float) -> list[Request]:
    """The same requests at so many times the pace: at `rate` a second, where they came at one a second."""
    require_float("rate", rate, 0.0, open_low=True, hint="it is how many arrive in a second")
    return [replace(request, arrival=request.arrival / rate) for request in requests]


Cut = Callable[[int], list[int]]


def passage(tokens: Sequence[int], rng: Random, n: int) -> list[int]:
    """n tokens in a row from anywhere in the text."""
    if len(tokens) < n:
        raise ValueError(f"the texts hold {len(tokens)} tokens and a passage of {n} was wanted: give more, or ask for less")
    start = rng.randint(0, len(tokens) - n)
    return list(tokens[start : start + n])


def chats(cut: Cut, rng: Random, longest: int) -> Iterator[list[int]]:
    """Turns of four chats that go on beside each other; each turn repeats all before it, and all begin with one system
    prompt."""
    system = cut(longest // 3)
    talks = [system] * 4
    while True:
        which = rng.randrange(len(talks))
        question = cut(longest // 8)
        before = talks[which] if len(talks[which]) + len(question) <= longest else system
        yield before + question
        talks[which] = before + question + cut(longest // 8)


def few_shot(cut: Cut, rng: Random, longest: int) -> Iterator[list[int]]:
    """Questions behind one header of examples."""
    header = cut(longest // 2)
    while True:
        yield header + cut(longest // 4)


def edits(cut: Cut, rng: Random, longest: int) -> Iterator[list[int]]:
    """A file, and what is to be done; each time a few tokens are other ones, more often far down than at the top."""
    file = cut(longest - longest // 8)
    while True:
        yield file + cut(longest // 8)
        at = int(len(file) * rng.random() ** 0.5)
        new = cut(8)[: len(file) - at]
        file = file[:at] + new + file[at + len(new) :]
