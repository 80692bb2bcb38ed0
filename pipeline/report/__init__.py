"""Pages about runs, from their files alone: `launch/report.py` and `launch/compare.py`.

errors      what ends a page before it is begun
run_files   a run directory as it was read: records, settings, events, and what is wrong with them
curves      the series of a metric over a run's steps, short enough to be drawn
colours     and dashes, by which heads, runs and sources are told apart
charts      matplotlib's figures, as pictures that a page carries with it
figures     which charts a page has
passage_page  a passage whose tokens are coloured by the heads that select them
comparison  final figures of runs paired by seed, with intervals
significance  paired t and sign tests, intervals, Holm's correction
page        the page: a summary, the charts, restarts, settings that differ
"""
