"""A folder to put on the path for programs that import `vllm` to generate in their own process.

Nothing of Penstock imports it, and it is on no path unless a user puts it there:
PYTHONPATH=$(python -m penstock.local.vllm_shim) python program.py
"""
