"""Samples of the policy while it trains: the same beginnings continued greedily, plainly and self-speculatively.

The prompts are the beginnings of documents of the run's fixed row, so they are the same on all ranks and in every start. Under
ZeRO-3 each forward is a collective, so all ranks take the same forwards: rows of a fixed length, without a key-value cache, and
an agreement before each step of speculative decoding, which takes as many as the text wants (arXiv 2404.19737, section 4).
Every forward is one as a validation makes it; weights, optimizer and the order of data are not touched.

Shapes: B prompts, L positions of a row, H heads, K = H - 1 drafts, W positions of a step.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from pipeline.data.loading.batch import Batch, Spans
from pipeline.generation.decoding import Counts
from pipeline.run import Run
from pipeline.runtime import heartbeat
from pipeline.runtime.distributed import any_rank
from pipeline.runtime.engine import give_up_gathered
from pipeline.runtime.metrics import Record
from pipeline.storage.files import read_whole
from pipeline.weighting.selectors import EveryPair

MOST_PROMPTS, LONGEST_PROMPT = 4, 16


class Sampler:
    """Takes samples of a run's policy, `logging.sample_tokens` tokens of each prompt."""

    def __init__(self, run: Run, texts: "RunTexts"):
        self.run, self.texts = run, texts
        self.prompts = prompts_of(run.fixed_batch)
        self.num_heads = run.settings.model.num_prediction_heads
        # Within the rows that the model is trained on.
        room = run.settings.data.sequence_length - max(map(len, self.prompts), default=0)
        self.num_tokens = min(run.settings.logging.sample_tokens, room)

    def take(self, step: int) -> list[Record]:
        """Continue each prompt; returns a record a prompt, alike on all ranks. Collective."""
        if not self.prompts:
            return []
        run = self.run
        rows = Rows(run.engine, self.prompts, self.num_tokens, self.num_heads, run.device)
        run.engine.eval()
        with torch.no_grad():
            plain = rows.continue_plainly()
            speculative = rows.continue_speculatively() if self.num_heads > 1 else None
        run.engine.train()
        give_up_gathered(run.engine)
        return [self._record(step, row, plain, speculative) for row in range(len(self.prompts))]

    def _record(
        self, step: int, row: int, plain: list[list[int]], speculative: tuple[list[list[int]], list[Counts]] | None
    ) -> Record:
        """A line of samples.jsonl (`runtime.sample_log`)."""
        record: Record = {"step": step, "prompt_ids": self.prompts[row], "plain_ids": plain[row]}
        record |= {"prompt": self.texts.of(self.prompts[row]), "plain": self.texts.of(plain[row])}
        if speculative is None:
            return record
        token_ids, counts = speculative[0][row], speculative[1][row]
        acceptance = {f"acceptance_head_{head}": share for head, share in enumerate(counts.acceptance, 1)}
        found = {"self_speculative_ids": token_ids, "self_speculative": self.texts.of(token_ids)}
        return record | found | {"accepted_per_step": counts.accepted_per_step} | acceptance


class RunTexts:
    """The texts of a run's token ids, by the tokenizer of its data, which is read when it is first needed.

    say: is told once, where the tokenizer is of no use; then ids have no text.
    """

    def __init__(self, run: Run, say: Callable[[str], None]):
        self.run, self.say = run, say
        self._tokenizer: Tokenizer | None = None
        self._is_read = False

    def of(self, token_ids: Sequence[int]) -> str | None:
        """Return the text of some tokens, special ones included; None without a tokenizer."""
        if not self._is_read:
            self._is_read, self._tokenizer = True, self._read()
        return None if self._tokenizer is None else str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def _read(self) -> Tokenizer | None:
        file = self.run.stream.sets[0].location / self.run.stream.manifest.tokenizer_file
        try:
            return Tokenizer.from_buffer(read_whole(file, self.run.settings.data.access))
        except Exception as error:  # The library raises bare ones, and no run ends for want of text.
            self.say(f"samples and passages have token ids and no text: {file} cannot be read: {error}")
            return None


class Rows:
    """Texts that are continued in lock step, as rows of one length, padded at their ends, which no earlier position sees.

    policy: the engine, or a model.
    """

    def __init__(
        self, policy: Callable[..., Any], prompts: Sequence[list[int]], num_tokens: int, num_heads: int, device: torch.device
    ):
        self.policy, self.prompts, self.num_tokens, self.num_heads = policy, prompts, num_tokens, num_heads
        # A text that is done may be longer by its last step's drafts, and is tried with its next ones all the same.
        length = max(map(len, prompts)) + num_tokens + 2 * num_heads
        self.shape, self.device = (len(prompts), length), device
        starts_S = torch.arange(0, len(prompts) * length + 1, length, dtype=torch.int32, device=device)
        self.spans = Spans(starts_S, length)
        self.document_ids_BL = torch.zeros(self.shape, dtype=torch.int32, device=device)

    def continue_plainly(self) -> list[list[int]]:
        """Continue each prompt by what head 0 finds most likely, a token a forward; returns the new ids."""
        texts = [list(prompt) for prompt in self.prompts]
        for _ in range(self.num_tokens):
            choices_BWH = self._choices(texts, [len(text) - 1 for text in texts], 1)
            for text, choices_WH in zip(texts, choices_BWH, strict=True):
                text.append(choices_WH[0][0])
        return self._new(texts)

    def continue_speculatively(self) -> tuple[list[list[int]], list[Counts]]:
        """The same by drafts of heads 1 … K that head 0 verifies; returns the new ids, and what was accepted of each row."""
        num_drafts = self.num_heads - 1
        texts, counts = [list(prompt) for prompt in self.prompts], [Counts(accepted=[0] * num_drafts) for _ in self.prompts]
        # Each row's next token and its drafts, chosen at the end of what is known.
        proposed = [choices_WH[0] for choices_WH in self._choices(texts, [len(text) - 1 for text in texts], 1)]
        while any_rank(any(self._is_short(row, text) for row, text in enumerate(texts)), self.device):
            tried = [text + heads for text, heads in zip(texts, proposed, strict=True)]
            choices_BWH = self._choices(tried, [len(text) for text in texts], self.num_heads)
            for row, (text, heads, choices_WH) in enumerate(zip(texts, proposed, choices_BWH, strict=True)):
                if not self._is_short(row, text):
                    continue
                # A draft is accepted where head 0, after those before it, chooses the same.
                accepted = 0
                while accepted < num_drafts and heads[accepted + 1] == choices_WH[accepted][0]:
                    accepted += 1
                counts[row].add(accepted)
                text += heads[: accepted + 1]
                proposed[row] = choices_WH[accepted]
        return self._new(texts), counts

    def _is_short(self, row: int, text: list[int]) -> bool:
        return len(text) < len(self.prompts[row]) + self.num_tokens

    def _new(self, texts: list[list[int]]) -> list[list[int]]:
        return [text[len(prompt) :][: self.num_tokens] for text, prompt in zip(texts, self.prompts, strict=True)]

    def _choices(self, texts: Sequence[list[int]], starts: Sequence[int], width: int) -> list[list[list[int]]]:
        """Each head's most likely tokens at `width` positions from each row's start on, [B][W][H]; one forward."""
        heartbeat.go_on()
        tokens_BL = torch.tensor([text + [0] * (self.shape[1] - len(text)) for text in texts], device=self.device)
        columns_BW = torch.tensor(starts, device=self.device)[:, None] + torch.arange(width, device=self.device)
        rows_B1 = torch.arange(len(texts), device=self.device)[:, None]
        wanted_BLH = torch.zeros(*self.shape, self.num_heads, dtype=torch.bool, device=self.device)
        wanted_BLH[rows_B1, columns_BW] = True
        losses = self.policy(
            tokens_BL,
            self.document_ids_BL,
            torch.zeros_like(wanted_BLH, dtype=torch.long),
            wanted_BLH,
            selector=EveryPair(wanted_BLH[..., 1:]),
            scale_H=torch.zeros(self.num_heads, device=self.device),
            spans=self.spans,
            num_valid_H=[len(texts) * width] * self.num_heads,
        )
        choices_BLH: Tensor = losses.choices_BTH
        found: list[list[list[int]]] = choices_BLH[rows_B1, columns_BW].tolist()
        return found


def prompts_of(batch: Batch) -> list[list[int]]:
    """The first halves of the first documents of a batch's first row, at most 16 tokens of each."""
    lengths = batch.documents.lengths_D[batch.documents.rows_D == 0].tolist()
    ends = list(itertools.accumulate(lengths))
    halves = [(end - length, min(LONGEST_PROMPT, length // 2)) for length, end in zip(lengths, ends, strict=True)]
    tokens = batch.tokens_BT[0].tolist()
    return [tokens[start : start + length] for start, length in halves if length][:MOST_PROMPTS]
