"""The selectors of one micro-batch: objects that the model calls once the policy's losses are known.

    EveryPair      all valid pairs: training without a comparison
    TopOfPool      the exact top k of the pool that the micro-batch belongs to, or is
    DecidedBefore  what a scoring pass over the whole step has decided

Each is a `selection.Selector`: `select` gives the selection from the policy's losses, exactly; `predicted_margin` guesses
beforehand, for the loss phase `predicted`.

Shapes: B rows, T tokens, H heads, K = H - 1 the heads that select, P some pairs in a flat list.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.weighting.exchange import Group
from pipeline.weighting.pools import SHARED_POOLS, select_local, select_shared
from pipeline.weighting.score import Comparison
from pipeline.weighting.selection import Selection, among_selecting_heads, select_all


@dataclass(frozen=True)
class EveryPair:
    """Selects every valid pair."""

    valid_BTK: Tensor
    share = 1.0
    predicts = True

    def after_first_head(self, first_loss_BT: Tensor) -> "EveryPair":
        """Nothing is compared."""
        return self

    def select(self, policy_loss_BTK: Tensor) -> Selection:
        """Select all of `valid_BTK`."""
        return select_all(policy_loss_BTK, self.valid_BTK)

    def predicted_margin(self, policy_loss_P: Tensor, indices_P: Tensor) -> Tensor:
        """Zero: every pair is known to be selected."""
        return torch.zeros_like(policy_loss_P)


@dataclass(frozen=True)
class TopOfPool:
    """Selects the top `k_percent` of a pool by score.

    pool: `global` or `step` (shared by the ranks of `group`), `rank` or `row` (this rank's own).
    num_valid_K, num_selected_K: of a shared pool over all ranks, known from the data.
    predicted_threshold_K: float32, expected thresholds; None without a prediction, as for the pools of a rank, whose
        thresholds are many.
    """

    compared: Comparison
    pool: str
    k_percent: float
    num_valid_K: Sequence[int]
    num_selected_K: Sequence[int]
    exchange: str
    group: Group
    predicted_threshold_K: Tensor | None

    @property
    def share(self) -> float:
        """The part of the valid pairs that will be selected, about."""
        return self.k_percent

    @property
    def predicts(self) -> bool:
        """True if `predicted_margin` may be called."""
        return self.predicted_threshold_K is not None

    def after_first_head(self, first_loss_BT: Tensor) -> "TopOfPool":
        """Return the selector that knows the policy's losses of head 0."""
        return replace(self, compared=self.compared.after_first_head(first_loss_BT))

    def select(self, policy_loss_BTK: Tensor) -> Selection:
        """Select exactly; runs the pool's collectives."""
        score_BTK, valid_BTK = self.compared.scores(policy_loss_BTK), self.compared.valid_BTK
        if self.pool in SHARED_POOLS:
            num_valid_MK = [self.num_valid_K]
            (selection,) = select_shared(
                score_BTK[None], valid_BTK[None], num_valid_MK, self.num_selected_K, self.exchange, self.group
            )
        else:
            selection = select_local(score_BTK, valid_BTK, self.k_percent, self.pool)
        return selection._replace(excess_BTK=self.compared.excess(policy_loss_BTK))

    def predicted_margin(self, policy_loss_P: Tensor, indices_P: Tensor) -> Tensor:
        """Score minus predicted threshold of some pairs."""
        assert self.predicted_threshold_K is not None
        num_selecting = len(self.predicted_threshold_K)
        indices_P = among_selecting_heads(indices_P, num_selecting)
        return self.compared.scores_at(policy_loss_P, indices_P) - self.predicted_threshold_K[indices_P % num_selecting]


@dataclass(frozen=True)
class DecidedBefore:
    """Hands out a selection that was made before the micro-batch is trained on."""

    selection: Selection
    share: float
    predicts = True

    def after_first_head(self, first_loss_BT: Tensor) -> "DecidedBefore":
        """Everything is decided."""
        return self

    def select(self, policy_loss_BTK: Tensor) -> Selection:
        """Return what was decided."""
        return self.selection

    def predicted_margin(self, policy_loss_P: Tensor, indices_P: Tensor) -> Tensor:
        """Half above zero where a pair is selected, half below elsewhere: never wrong."""
        selected_BTK = self.selection.selected_BTK
        return selected_BTK.take(among_selecting_heads(indices_P, selected_BTK.shape[-1])).float() - 0.5
