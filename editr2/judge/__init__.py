"""A reward, tried on sessions and outputs that are there: `editr2 judge`.

`outputs` reads what `editr2 rollout` wrote and `labels` what people said of it; `trial` asks, with
every answer on record; `summary` says what came back (is there a signal, what does it cost, what
fails) and `agreement` how far it is of one mind with the labels or with another reward. `text` and
`page` show it.
"""
