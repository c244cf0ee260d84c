"""Benchmarks of editors: `editr2 benchmark`.

An entry of `table` says what a benchmark's sessions are, what judges them and which numbers its
paper reports. A benchmark is done in three stages, each of which goes on where it was stopped:
`generate` edits the sessions (`passes` says in which ways) and writes images as `layouts` has them;
`judging` asks the reward about every image and writes `rows` (until all are there, `parts`);
`summary` makes numbers of them (`measures`), and `text`, `page` and `paper` show them. `compare`
holds two of them against each other.
`rewards` turns it round: sets of labelled pairs, which judge a reward.
"""
