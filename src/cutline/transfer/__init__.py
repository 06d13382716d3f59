"""Moving an encoder to a task: classification, segmentation, depth or detection, on your own data or a benchmark's.

`classify.classify`, `segment.segment`, `depth.depth` and `detect.detect` are the whole task in one call, fine-tuned or
frozen; `fit` and `score` beside them are its halves.
Nothing is imported here, because torch is slow to import and the command line reads this package for its help.
"""
