"""How often a head's choice is the one that head 0 will make: the share of drafts that self-speculative decoding would accept,
with the text given (arXiv 2404.19737, section 4).

    draft_agreement_head_h = mean over the valid pairs (t, h) of [argmax of head h at t = argmax of head 0 at t + h]

Both predict the token t + 1 + h, so the pair of head 0 is valid where head h's is. The measure is head 0's choice, not the
text: head 0 is the verifier, and the text would measure how well a head predicts.

Shapes: B rows, T tokens, H heads, K = H - 1 the heads that draft, S sources.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.runtime.metrics import Record, ratio
from pipeline.weighting.exchange import Group, all_reduce_sum


class AgreementSums:
    """Sums over the micro-batches of a validation, on the device: pairs that agree and valid pairs, by source."""

    def __init__(self, num_heads: int, num_sources: int, device: torch.device):
        self.sources_S = torch.arange(num_sources, device=device)
        self.agreed_valid_S2K = torch.zeros(num_sources, 2, num_heads - 1, dtype=torch.float64, device=device)

    def add(self, choices_BTH: Tensor, valid_BTH: Tensor, sources_BT: Tensor) -> None:
        """Add a rank's micro-batch; nothing here waits for the device. choices_BTH: int64, each head's most likely token."""
        # Head 0's choice at t + h, and what no token has where the row ends before.
        first_BT, heads = choices_BTH[..., 0], range(valid_BTH.shape[-1])
        first_BTK = torch.stack([F.pad(first_BT[:, head:], (0, head), value=-1) for head in heads], dim=-1)[..., 1:]

        # Sums by source.
        valid_BTK = valid_BTH[..., 1:]
        counted_BT2K = torch.stack([valid_BTK & (choices_BTH[..., 1:] == first_BTK), valid_BTK], dim=2)
        is_of_source_SN = sources_BT.flatten() == self.sources_S[:, None]
        sums = is_of_source_SN.double() @ counted_BT2K.flatten(0, 1).flatten(1).double()
        self.agreed_valid_S2K += sums.view_as(self.agreed_valid_S2K)

    def record(self, source_names: Sequence[str], group: Group) -> Record:
        """Return the metrics; one collective, which every rank must join. Without names ("") there are none by source."""
        agreed_valid_S2K = all_reduce_sum(self.agreed_valid_S2K, group).cpu()
        of_all = [("", agreed_valid_S2K.sum(0))]
        by_source = [(f"_source_{name}", sums) for name, sums in zip(source_names, agreed_valid_S2K, strict=True) if name]
        return {
            f"draft_agreement_head_{head}{suffix}": ratio(agreed, valid)
            for suffix, sums_2K in of_all + by_source
            for head, (agreed, valid) in enumerate(sums_2K.T.tolist(), start=1)
        }
