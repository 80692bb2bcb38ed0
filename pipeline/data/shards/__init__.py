"""Prepared shards, the format on disk.

`manifest` (with `table`) describes a prepared folder, `writer` and `output_folder` make one, `reader` (with `index`, `sample`)
reads its rows, and `reference_losses` those of a frozen reference beside them. `merging` joins folders, `verification` and
`inspection` look at them, `adoption` takes in those of others; `tars` reads what others wrote.
"""
