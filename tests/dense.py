"""The objective of a small batch by its formula, from full logits in one process: what training must agree with."""

import math
from typing import Any

import torch
import torch.nn.functional as F

from pipeline.config import Settings
from pipeline.data.loading.batch import Batch
from pipeline.model.mtp import MTPModel, initialize_weights
from pipeline.schedule import head_weights_at
from tests.rows import batch_with

ROWS, TOKENS, HEADS, VOCAB = 8, 14, 4, 37


def settings_for(world_size: int, micro_steps: int, **training: Any) -> Settings:
    return Settings.model_validate(
        {
            "data": {"global_batch": ROWS, "micro_batch": ROWS // (world_size * micro_steps), "sequence_length": TOKENS},
            "model": {"dim": 16, "num_layers": 2, "num_attention_heads": 2, "ffn_dim": 32, "vocab_size": VOCAB}
            | training.pop("model", {}),
            "reference": {"horizon": training.pop("horizon", "shifted")},
            "training": {"head_weights": [1.0, 0.5, 2.0, 0.7], "gradient_clipping": None} | training,
        }
    )


def whole_batch() -> Batch:
    """Eight rows: the first two are padding alone (so some rank's whole micro-batch is), the others hold unequal documents,
    so that no two micro-steps have equally many pairs."""
    generator = torch.Generator().manual_seed(5)
    lengths = [[], [], [4, 7], [2, 2, 5], [14], [3, 6], [1, 2, 11], [5, 5, 1]]
    return batch_with(torch.randint(VOCAB, (ROWS, TOKENS), generator=generator), lengths)


def dense_model(settings: Settings, **changes: Any) -> MTPModel:
    model = MTPModel(settings.model.model_copy(update=changes))
    initialize_weights(model)
    return model


def all_losses(model: MTPModel, batch: Batch) -> torch.Tensor:
    """Cross-entropy [rows, tokens, heads] from full logits, 0 beyond the row."""
    hidden = model.unembed.norm(model.hidden_states(batch.tokens_BT, batch.document_ids_BT))
    logits = hidden @ model.unembed.weight.T
    losses = []
    for head in range(hidden.shape[2]):
        targets = F.pad(batch.tokens_BT[:, 1 + head :], (0, 1 + head))
        losses.append(
            F.cross_entropy(logits[:, :, head].flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        )
    return torch.stack(losses, -1)


def external_scores() -> torch.Tensor:
    """A score of each token of the whole batch, [rows, tokens]."""
    return torch.randn(ROWS, TOKENS, generator=torch.Generator().manual_seed(9))


def dense_objective(settings: Settings, world_size: int, policy: MTPModel | None = None) -> tuple[torch.Tensor, MTPModel]:
    """The objective by its formula. policy: by default one with its initial weights."""
    by_head, policy = dense_objective_by_head(settings, world_size, policy)
    return torch.stack(by_head).sum(), policy


def dense_objective_by_head(
    settings: Settings, world_size: int, policy: MTPModel | None = None
) -> tuple[list[torch.Tensor], MTPModel]:
    """Each head's part of the objective; every pool is a range of consecutive rows, in whose order ties are taken."""
    micro_batch = settings.data.micro_batch
    rows_a_pool = {"global": world_size * micro_batch, "step": ROWS, "rank": micro_batch, "row": 1}
    num_pools = ROWS // rows_a_pool[settings.training.selection_pool]
    batch, policy = whole_batch(), policy or dense_model(settings)
    reference = dense_model(settings, num_prediction_heads=1, seed=1, tied_embeddings=False)
    policy_loss = all_losses(policy, batch)
    with torch.no_grad():
        next_token = all_losses(reference, batch)[..., 0]
    pairs: dict[int, list[list[tuple[int, int]]]] = {head: [[] for _ in range(num_pools)] for head in range(HEADS)}
    for head in range(HEADS):
        for row in range(ROWS):
            for t in range(TOKENS - 1 - head):
                document = batch.document_ids_BT[row, t]
                if document >= 0 and batch.document_ids_BT[row, t + 1 + head] == document:
                    pairs[head][row // (ROWS // num_pools)].append((row, t))
    by_head = []
    scores, own = external_scores(), settings.reference.horizon == "own"
    for head, pools in pairs.items():
        selected = []
        for pool in pools:
            count = math.floor(settings.training.k_percent * len(pool) + 0.5)
            count = len(pool) if head == 0 else max(1, count)

            def excess(place: tuple[int, int], head: int = head) -> float:
                row, t = place
                if settings.training.selection_score == "external":
                    return scores[row, t + 1 + head].item()
                if own:
                    return (policy_loss[row, t, head] - policy_loss[row, t + head, 0]).item()
                return (policy_loss[row, t, head] - next_token[row, t + head]).item()

            selected += sorted(pool, key=lambda place: (-excess(place), place))[: count if pool else 0]
        total = len(selected) if settings.training.normalize_by == "selected" else sum(map(len, pools))
        weight = head_weights_at(settings, 0)[head] / HEADS
        by_head.append(sum((weight * policy_loss[row, t, head] / total for row, t in selected), torch.zeros(())))
    return by_head, policy
