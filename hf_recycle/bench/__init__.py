"""Paired measurements of speed, memory and the cost of each method: `hf-recycle bench`."""
