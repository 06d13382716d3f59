"""Moving an encoder to dense tasks: segmentation, depth and detection, on your own data or a benchmark's.

`segment.segment`, `depth.depth` and `detect.detect` are the whole task in one call; `fit` and `score` beside them are its halves.
Nothing is imported here, because torch is slow to import and the command line reads this package for its help.
"""
