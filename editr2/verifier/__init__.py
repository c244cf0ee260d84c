"""Edit-R1 (arXiv 2604.27505): a reasoning verifier, trained to be a reward.

What a verifier writes and how it is read stands in `editr2.rewards.traces`, and the reward in
`editr2.rewards.verifier`. Here is how one is made: `files` (what every stage reads and leaves),
`credit` (GCPO's rewards and advantages).
"""
