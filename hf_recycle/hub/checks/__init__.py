"""Checks on files that others wrote, before anything uses them. A run reads its own by `hf_recycle.records.files`."""
