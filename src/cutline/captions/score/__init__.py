"""Scores of captions: of the text alone (`text`), with a CLIP (`clip`), against the truth of scenes (`truth`).

`plan` says which works make them and runs them, `summary` sums them up over a set.
"""
