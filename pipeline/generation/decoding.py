"""Decode a batch of prompts, plainly or self-speculatively: one loop, in which plain decoding has no drafts.

A step runs the last token and its K drafts through the model at once. Head 0 tells which drafts are what it would have chosen
or drawn (`sampling.verify`) and chooses the token after them, and at the last accepted place heads 1 … K draft anew. A step
therefore adds 1 to K + 1 tokens. Rows have lengths of their own, and go on alone when others are done.

Greedy, the tokens are those of plain decoding. One exception is inherent: a forward over several tokens sums in another order
than one over a single token, so where two tokens are as likely up to rounding the choice may fall on the other one.

Shapes: B rows, K drafts, S = K + 1 tokens of a step, H = K + 1 heads, D width, V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.generation.cached_model import CachedModel
from pipeline.generation.sampling import Sampling, draw, verify
from pipeline.model.mtp import MTPModel

Listener = Callable[[int, list[int]], None]
"""Is told of a row's new tokens as they come: (row, ids)."""


@dataclass
class Completion:
    """Continuation of a prompt. limit: most tokens. finish: `stop` after a stop token, which is the last id, or `length`."""

    limit: int
    stop_ids: frozenset[int]
    token_ids: list[int] = field(default_factory=list)
    finish: str | None = None

    def add(self, token_ids: list[int]) -> list[int]:
        """Add tokens up to the end, if that is among them; returns those that were added."""
        before = len(self.token_ids)
        for token_id in token_ids:
            if self.finish is None:
                self.token_ids.append(token_id)
                full = "length" if len(self.token_ids) == self.limit else None
                self.finish = "stop" if token_id in self.stop_ids else full
        return self.token_ids[before:]


@dataclass
class Counts:
    """Counts over all rows: steps that verified, and drafts that were accepted, of each head from 1 on."""

    steps: int = 0
    accepted: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, num_accepted: int) -> None:
        """Count a step of one row."""
        self.steps += 1
        self.accepted = [count + (num_accepted > draft) for draft, count in enumerate(self.accepted)]

    def __iadd__(self, other: "Counts") -> "Counts":
        accepted = [mine + theirs for mine, theirs in zip(self.accepted, other.accepted, strict=True)]
        return Counts(self.steps + other.steps, accepted, self.seconds + other.seconds)

    @property
    def accepted_per_step(self) -> float | None:
        """Mean tokens that head 0 accepts in a step, its own included: 1 in plain decoding."""
        return 1 + sum(self.accepted) / self.steps if self.steps else None

    @property
    def acceptance(self) -> list[float | None]:
        """Share of the steps in which each head's draft was accepted, from head 1 on."""
        return [count / self.steps if self.steps else None for count in self.accepted]


@torch.inference_mode()
def decode(
    model: MTPModel,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    stop_ids: frozenset[int] = frozenset(),
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    num_drafts: int = 0,
    seed: int = 0,
    listener: Listener | None = None,
) -> tuple[list[Completion], Counts]:
    """Continue prompts, each of at least one token.

    limits: most tokens of each completion, at least 1.
    num_drafts: K, less than the model's heads; 0 is plain decoding.
    """
    started = time.perf_counter()
    device = model.embed.weight.device
    lengths = [len(prompt) for prompt in prompts]
    capacity = max(length + limit for length, limit in zip(lengths, limits, strict=True)) + num_drafts
    cached = CachedModel(model, len(prompts), capacity, num_drafts + 1)
    generator = torch.Generator(device).manual_seed(seed)

    # The prompts give each row's first token.
    completions = [Completion(limit, stop_ids) for limit in limits]
    counts = Counts(accepted=[0] * num_drafts)
    hidden_BHD = _read_prompts(cached, prompts, device)
    next_B = draw(sampling.probabilities(cached.logits(hidden_BHD[:, 0])), generator)
    _add(completions, [[token] for token in next_B.tolist()], listener)

    while any(completion.finish is None for completion in completions):
        step = _step(cached, hidden_BHD, next_B, lengths, sampling, generator)
        hidden_BHD, next_B = step.hidden_BHD, step.next_B
        lengths = _take(completions, step.added, lengths, counts, listener)
    counts.seconds = time.perf_counter() - started
    return completions, counts


def _read_prompts(cached: CachedModel, prompts: Sequence[list[int]], device: torch.device) -> Tensor:
    """Run the prompts, padded at their ends, which no later query sees; returns their last positions' [B, H, D]."""
    longest = max(map(len, prompts))
    padded_BS = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
    hidden_BSHD = cached.hidden_states(padded_BS, [0] * len(prompts))
    last_B = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    return hidden_BSHD[torch.arange(len(prompts), device=device), last_B]


class _Step(NamedTuple):
    """Result of a step. added: each row's accepted drafts, then the next token. hidden_BHD: where that was chosen."""

    added: list[list[int]]
    next_B: Tensor
    hidden_BHD: Tensor


def _step(
    cached: CachedModel,
    hidden_BHD: Tensor,
    next_B: Tensor,
    lengths: list[int],
    sampling: Sampling,
    generator: torch.Generator,
) -> _Step:
    """Take one step of all rows. next_B: the token at position `lengths`, chosen where the heads had hidden_BHD."""
    # Heads 1 … K draft what follows the next token.
    q_BKV = sampling.probabilities(cached.logits(hidden_BHD[:, 1:]))
    drafts_BK = draw(q_BKV, generator)

    # Head 0 verifies, and chooses the token after what it has accepted.
    hidden_BSHD = cached.hidden_states(torch.cat([next_B[:, None], drafts_BK], dim=1), lengths)
    p_BSV = sampling.probabilities(cached.logits(hidden_BSHD[:, :, 0]))
    accepted_B, next_B = verify(p_BSV, q_BKV, drafts_BK, generator)

    rows = zip(drafts_BK.tolist(), accepted_B.tolist(), next_B.tolist(), strict=True)
    added = [[*drafts[:accepted], token] for drafts, accepted, token in rows]
    return _Step(added, next_B, hidden_BSHD[torch.arange(len(added), device=next_B.device), accepted_B])


def _take(
    completions: Sequence[Completion],
    added: Sequence[list[int]],
    lengths: Sequence[int],
    counts: Counts,
    listener: Listener | None,
) -> list[int]:
    """Add a step's tokens to the rows that go on, and count it; returns the lengths. Rows that are done stay where they are."""
    for completion, token_ids in zip(completions, added, strict=True):
        if completion.finish is None:
            counts.add(len(token_ids) - 1)
    _add(completions, added, listener)
    of_rows = zip(lengths, added, completions, strict=True)
    return [length + len(token_ids) * (completion.finish is None) for length, token_ids, completion in of_rows]


def _add(completions: Sequence[Completion], added: Sequence[list[int]], listener: Listener | None) -> None:
    for row, (completion, token_ids) in enumerate(zip(completions, added, strict=True)):
        new = completion.add(token_ids)
        if new and listener is not None:
            listener(row, new)
