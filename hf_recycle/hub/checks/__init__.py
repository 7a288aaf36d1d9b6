"""Checks on files that others wrote, before anything uses them. A run's own files need less: `hf_recycle.files`."""
