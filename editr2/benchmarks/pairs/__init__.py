"""Sets of labelled comparisons, which judge a reward: `editr2 benchmark editscore-bench --reward…`.

`labelled` is what every set is read into; `editscore`, `tiger` and `files` read the public ones and
a user's own; `judging` asks the reward about every output once; `accuracy` holds what it said
against the labels, and `printed` and `page` show it. `editr2.benchmarks.rewards` has the table of
sets and does all of it.
"""
