"""Checkpoints in a format of our own: safetensors and JSON, which any layout of ranks can write and any other read.

checkpoints    saves, finds and loads the checkpoints of one run directory
commit         writes a checkpoint in the background, and makes it one
folders        finds checkpoints and verifies their bytes, without torch
continuing     may a run continue from a checkpoint? its settings and losses, compared
read           loads a checkpoint into an engine, verifying every byte
retention      which checkpoint folders stay
weights        a verified checkpoint's weights, tensor by tensor, without an engine
fragments      this rank's share of every parameter and optimizer state, in any ZeRO stage
fragment_file  one rank's file, hashed while it is written and read
state          the file state.json
"""
