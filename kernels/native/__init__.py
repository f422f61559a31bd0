"""A small C library of the CPU's hot ops: built from `src/` by `build.py`, found and bound by `library.py`."""
