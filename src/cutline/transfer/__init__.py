"""Moving an encoder to a task: classification, segmentation or depth, fine-tuned or frozen, on your own data or a benchmark's.

`classify.classify`, `segment.segment` and `depth.depth` are the whole task in one call; `fit` and `score` beside them are its halves.
Nothing is imported here, because torch is slow to import and the command line reads this package for its help.
"""
