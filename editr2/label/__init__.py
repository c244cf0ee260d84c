"""What people prefer: a local page that shows outputs blind, and what comes of their votes.

`questions` are what is asked, of a folder's files; `store` keeps them and every vote in SQLite;
`serve` is the page; `summary` says how people agree and whether somebody favours a side; `export`
writes `pairs.jsonl`. The reward `human` asks through the same store.
"""
