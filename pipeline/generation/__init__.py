"""Decoding, plain and self-speculative (arXiv 2404.19737, section 4): heads 1, 2, … draft tokens, head 0 verifies them.

decoding      the loop over steps, for a batch of prompts, and what it counts
cached_model  a model with the keys and values of the tokens that it has seen
sampling      from logits to tokens, and the verification of drafts
prompts       from texts to ids and back
report        the figures of a way of decoding, and their table
generate      what launch/generate.py does
for_transformers  the same decoding for `generate` of transformers
"""

from pipeline.generation.for_transformers import SelfSpeculative as self_speculative  # noqa: N813 (called as a function)

__all__ = ["self_speculative"]
