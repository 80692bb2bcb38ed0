"""The objective in plain torch: per-token losses, excess loss, exact top-k selection over ranks, weighted cross-entropy.

A micro-batch walks through: loss_phase (with cross_entropy) → pools → exchange and selection → loss_phase.

loss_phase     hidden states to losses, the selection among them, and the loss over the selected pairs
cross_entropy  chunked cross-entropy, with and without gradient; never all logits
pools          the four pools of the top k_percent, and the scores that are ranked in them
selection      the exact top k_percent of a pool
exchange       finds the exact threshold of a pool over ranks: all-gather or radix histograms
objective      pair counts, selection sizes and loss scales of a step, known before anything is computed
prediction     predicts the next thresholds, so that gradients can be computed while scoring
rho1           the dense API of README's "In your own loop", and the oracle in tests
"""
