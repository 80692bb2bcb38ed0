"""A selector that selects the pairs it is told to."""

import torch

from pipeline.weighting.selection import Selection, among_selecting_heads, select_all


class Given:
    """Selects `selected_BTK` (bool); predicts `predicted_BTK` (bool), or nothing where it is None."""

    def __init__(self, selected_BTK: torch.Tensor, predicted_BTK: torch.Tensor | None = None, share: float = 1.0):
        self.selected_BTK, self.predicted_BTK, self.share = selected_BTK, predicted_BTK, share

    @property
    def predicts(self) -> bool:
        return self.predicted_BTK is not None

    def after_first_head(self, first_loss_BT: torch.Tensor) -> "Given":
        return self

    def select(self, policy_loss_BTK: torch.Tensor) -> Selection:
        return select_all(policy_loss_BTK, self.selected_BTK)

    def predicted_margin(self, policy_loss_P: torch.Tensor, indices_P: torch.Tensor) -> torch.Tensor:
        assert self.predicted_BTK is not None
        indices_P = among_selecting_heads(indices_P, self.predicted_BTK.shape[-1])
        return self.predicted_BTK.flatten()[indices_P].float() - 0.5
