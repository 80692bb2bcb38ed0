"""Proof of a run by its own records: `launch/audit.py`. Nothing here loads torch.

history      events.jsonl as the line of steps that the run has ended up with, and what was abandoned
samples      every step's samples against the order that they should have come in
metrics      metrics.jsonl against the line of steps
checkpoints  which checkpoints are sound, every byte read
wall_clock   where the time went
report       all of it as figures and as text
"""
