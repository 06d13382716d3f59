"""Cutline: from pictures with poor text to vision backbones that see."""
