"""A small C library of the CPU's hot ops: made of `src/` by `build.py`, found and bound by `library.py`."""
