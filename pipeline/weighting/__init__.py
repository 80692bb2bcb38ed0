"""The objective in plain torch: per-token losses, scores, exact top-k selection over ranks, weighted cross-entropy.

A micro-batch walks through: loss_phase (scores all pairs) → selectors (score, pools, exchange, selection) → loss_phase (loss
and gradient of the selected pairs).

loss_phase     hidden states to losses, the selection among them, and the loss over the selected pairs
cross_entropy  chunked cross-entropy, with and without gradient; never all logits
score          the scores by which pairs compete: excess loss, and two controls
selectors      the selectors of a micro-batch, which the model calls with the policy's losses
pools          the four pools that the top k_percent are selected in
selection      the exact top k_percent of a pool
exchange       finds the exact threshold of a pool over ranks: all-gather or radix histograms
objective      pair counts, selection sizes and loss scales of a step, known before anything is computed
prediction     predicts the next thresholds, so that gradients can be computed while scoring
rho1           the dense API of README's "In your own loop", and the oracle in tests
"""
