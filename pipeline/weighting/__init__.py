"""The weighting of pairs: per-token losses, the exact selection over ranks, and the objective. Plain torch.

score           the scores by which pairs compete: excess loss, and controls
selection       the exact top k of a pool on one process, and what a selector is
pools           the four pools: global, step, rank, row
exchange        the exact top of a pool that ranks share, by gathering or by histograms
selectors       the selectors of a micro-batch: EveryPair, TopOfPool, DecidedBefore
prediction      the next thresholds, predicted from those so far
objective       a step's counts over all ranks, and the scale of every loss
cross_entropy   cross-entropy and its gradients in chunks of rows
loss_phase      from hidden states to losses, selection and gradient; the dense oracle
rho1            the dense API: selective weights from logits
"""
