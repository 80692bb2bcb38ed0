"""The policy and the reference in plain torch.

mtp           the multi-token prediction model: trunk, prediction heads, unembedding
transformer   the Llama-family block: RMSNorm, RoPE, grouped-query attention, SwiGLU
rotary        RoPE's frequencies, plain or scaled for longer rows
key_values    keys and values of tokens that a model has seen, for decoding
elementwise   RoPE and SwiGLU's product, compiled on CUDA
recompute     activation checkpointing: none, selective, full
reference     losses of the frozen reference, indexed by head
huggingface   loads models in Hugging Face's layout
layout        Hugging Face's names of tensors, or Meta's
meta          Meta's params.json, and its order of rotary rows
export        writes them
drafter       head 1 as an EAGLE-3 drafter, as serving engines read it
block_losses  losses of a model in files, with one block in memory
model_config  its config.json: what it says is used, or refused by name
rotary_config  the rotary positions that config.json describes
weight_files  its safetensors files and their index
"""
