"""Scores one held-out passage while a run trains: which heads select which of its tokens, and by what excess loss.

The passage is the beginning of the run's fixed row, the same on all ranks and in every start; its pool is the row by itself.
The forwards are those of a validation, so training is not moved by it.

Shapes: B = 1 row, T tokens, H heads, K = H - 1 the heads that select.
"""

from dataclasses import replace

import torch
from torch import Tensor

from pipeline.micro_step import comparisons, count_step, has_reference, load_micro_batches, policy_losses, selectors_of
from pipeline.report.passage_page import Mark, Passage
from pipeline.run import Run
from pipeline.runtime import heartbeat
from pipeline.runtime.engine import give_up_gathered
from pipeline.samples import RunTexts
from pipeline.schedule import objective_at
from pipeline.weighting.prediction import Prediction
from pipeline.weighting.selection import Selection

MOST_TOKENS = 160


def passage_of(run: Run, step: int, texts: RunTexts) -> Passage | None:
    """Score the passage; None where no head selects, or the reference's losses of it are not known. Collective."""
    if run.settings.model.num_prediction_heads == 1 or not has_reference(run.models, run.fixed_batch):
        return None
    heartbeat.go_on()
    run.engine.eval()
    with torch.no_grad():
        selection, valid_BTK = _select(run, step)
    run.engine.train()
    give_up_gathered(run.engine)
    if selection.excess_BTK is None:
        return None
    token_ids = run.fixed_batch.tokens_BT[0, :MOST_TOKENS].tolist()
    tables = [table[0].cpu() for table in (valid_BTK, selection.selected_BTK, selection.excess_BTK)]
    return Passage(step, [_text(texts, token) for token in token_ids], _marks(tables, len(token_ids)))


def _select(run: Run, step: int) -> tuple[Selection, Tensor]:
    """Run reference and policy on the fixed row; returns its selection, and its valid pairs [B, T, K]."""
    training, num_heads = run.settings.training, run.settings.model.num_prediction_heads
    micro_batches = load_micro_batches([run.fixed_batch], 0, num_heads, 1, 0, run.device)

    # The row is a pool of its own, because all ranks have the same one.
    models, objective = replace(run.models, group=None), replace(objective_at(run.settings, step), pool="row")
    num_sources = int(run.fixed_batch.documents.sources_D.max(initial=0)) + 1
    counts = count_step(micro_batches, objective, num_sources, None).read().counts
    compared = comparisons(models, micro_batches, training)
    selectors = selectors_of(models, micro_batches, compared, counts, training, Prediction())
    (losses,) = policy_losses(models, micro_batches, selectors, counts, training)
    return losses.selection, micro_batches[0].valid_BTH[..., 1:]


def _marks(tables: list[Tensor], num_tokens: int) -> list[list[Mark | None]]:
    """Selection and excess loss of each token by each head, [K][tokens]: head h at position t predicts token t + 1 + h."""
    valid_TK, selected_TK, excess_TK = (table.tolist() for table in tables)
    return [
        [
            Mark(selected_TK[position][head - 1], excess_TK[position][head - 1])
            if (position := token - 1 - head) >= 0 and valid_TK[position][head - 1]
            else None
            for token in range(num_tokens)
        ]
        for head in range(1, len(valid_TK[0]) + 1)
    ]


def _text(texts: RunTexts, token: int) -> str:
    """The text of a token by itself; its number where the data's tokenizer is of no use."""
    text = texts.of([token])
    return f"{token} " if text is None else text
