"""Pseudo-labels of experts as columns of a table: `cutline label`, for the objective `experts` (CLIPTeX)."""
