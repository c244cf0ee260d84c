"""`editr2 reproduce`: the papers' comparisons on the shapes world, from training runs to one page
with intervals.

`arms` says what is compared, `runs` trains it, `rows` is what a run leaves in `reproduction.jsonl`,
and `page` (with `intervals`, `claims` and `plots`) makes the page from the rows alone.
"""
