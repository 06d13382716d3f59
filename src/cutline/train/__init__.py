"""Pretraining: stream, loop, optimiser, checkpoints."""
