"""Draft agreement of a validation against full logits, pair by pair, on one process and on two ranks."""

from typing import Any

import pytest
import torch

from pipeline.config import Settings
from pipeline.data.loading.batch import targets_and_valid
from pipeline.model.mtp import MTPModel
from tests.dense import HEADS, dense_model, settings_for, whole_batch
from tests.ranks import run_ranks
from tests.rows import part_of
from tests.unit.test_evaluate import ONE_BYTE, evaluated


def counted_by_hand(policy: MTPModel) -> dict[str, float]:
    """Each pair's two choices, from all logits at once."""
    batch = whole_batch()
    _, valid = targets_and_valid(batch.tokens_BT, batch.document_ids_BT, HEADS)
    with torch.no_grad():
        hidden = policy.hidden_states(batch.tokens_BT, batch.document_ids_BT)
        choices = (policy.unembed.norm(hidden) @ policy.unembed.weight.T).argmax(-1).tolist()
    shares = {}
    for head in range(1, HEADS):
        pairs = valid[..., head].nonzero().tolist()
        agreed = [choices[row][t][head] == choices[row][t + head][0] for row, t in pairs]
        shares[f"draft_agreement_head_{head}"] = sum(agreed) / len(agreed)
    return shares


def models(settings: Settings) -> tuple[MTPModel, MTPModel]:
    policy = dense_model(settings)
    with torch.no_grad():
        # So that some choices agree and some do not.
        for head in policy.heads[1:]:
            for own, first in zip(head.parameters(), policy.heads[0].parameters(), strict=True):
                own.lerp_(first, 0.9)
    return policy, dense_model(settings, num_prediction_heads=1, seed=1)


def shares_of_a_rank(rank_rows: list[slice]) -> dict[str, Any]:
    settings = settings_for(1, 4)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    num_ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    batches = [part_of(whole_batch(), rows) for rows in rank_rows[rank::num_ranks]]
    record, _ = evaluated(settings, *models(settings), batches, ONE_BYTE)
    return {key: value for key, value in record.items() if key.startswith("draft_agreement")}


ROWS = [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_agreement_is_the_share_of_pairs_that_choose_as_head_0_will(ranks: int) -> None:
    expected = counted_by_hand(models(settings_for(1, 4))[0])
    assert len(set(expected.values())) > 1
    assert 0 < min(expected.values()) < max(expected.values()) < 1
    found = run_ranks(shares_of_a_rank, 2, ROWS) if ranks == 2 else [shares_of_a_rank(ROWS)]
    for of_rank in found:
        assert of_rank == pytest.approx(expected)


def test_the_choices_are_those_of_the_dense_oracle() -> None:
    chunked, dense = (settings_for(1, 4, loss_phase=phase) for phase in ("two_pass", "dense"))
    of_both = [
        evaluated(settings, *models(settings), [whole_batch()], ONE_BYTE)[0]["draft_agreement_head_2"]
        for settings in (chunked, dense)
    ]
    assert of_both[0] == of_both[1]


def test_every_source_has_an_agreement_of_its_own_and_their_sums_are_the_whole() -> None:
    from pipeline.runtime.draft_agreement import AgreementSums

    choices = torch.tensor([[[5, 6], [6, 9], [7, 7], [7, 1]], [[1, 1], [1, 1], [2, 2], [2, 0]]])
    valid = torch.tensor([[[1, 1], [1, 1], [1, 1], [1, 0]], [[1, 1], [1, 0], [1, 1], [1, 0]]]).bool()
    sources = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0]])
    sums = AgreementSums(2, 3, torch.device("cpu"))
    sums.add(choices, valid, sources)
    # Row 0: 6 = 6, 9 ≠ 7, 7 = 7. Row 1: 1 = 1 of source 1, and after a pair that is not valid 2 = 2 of source 0.
    assert sums.record(("web", "", "none"), None) == {
        "draft_agreement_head_1": 4 / 5,
        "draft_agreement_head_1_source_web": 3 / 4,
        "draft_agreement_head_1_source_none": None,
    }
