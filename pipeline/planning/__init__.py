"""What a run needs of each rank's memory, computed from shapes before anything is built.

`case` is what is planned, `states` what DeepSpeed holds of the model, `activations` what a forward and its losses leave for
backward, `plan` puts them together moment by moment, and `advice` says which setting brings how much.
"""
