"""Captions: write, fuse, score, select and reinforce. Each is a `Work` that the engine runs over a table of pairs."""
