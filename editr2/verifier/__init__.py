"""Edit-R1 (arXiv 2604.27505): a reasoning verifier, trained to be a reward.

What a verifier writes and how it is read stands in `editr2.rewards.traces`, and the reward in
`editr2.rewards.verifier`. Here is how one is made, a stage a module, over plain files (`files`):
`principles`, `tracing` and `select` make what is learnt from; `loop` trains by an entry of
`objectives` (`sft`, `gcpo`, whose rewards and advantages are `credit`'s); `evaluate` says what it
is worth. `world` and its neighbours are the shapes world's own.
"""
