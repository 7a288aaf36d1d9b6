"""What we use of other libraries without a promise from them: private names, one file a library, and nowhere else.

`tests/test_internals.py` says what an upgrade of a library changed.
"""
