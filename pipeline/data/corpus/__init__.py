"""Documents to rows, offline.

The modules in the order of the data's way: `inputs` finds files and slices them, `documents` reads text (`columns`, `lines`),
`tokenization` turns it into ids in `sorted_runs` on disk, from which `shard_assembly` packs rows (`packing`). `prepare` and
`prepare_files` do all of that, on many `workers`, with a `display`; `request` says what was asked for. `builtin` prepares the
demo's corpus.
"""
