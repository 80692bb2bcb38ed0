"""The experiment of `launch/experiment.py`: arms that differ in one thing, over learning rates and paired seeds.

conduct       from the plan to the results
plan          what is run: arms, rates, seeds; read from a file before the first run
corpus        real text and labelled noise, with the truth of each token
preparing     what all runs share: the data, the references and their losses, external scores
runs          each run by launch/train.py, once, on a core or GPU of its own
measuring     the speed of arms, and what decoding accepts, once all runs are done
selections    which tokens two selections share, and the truth about them
results       the figures of all runs, and what the comparisons say
page          the results as one HTML page
"""
