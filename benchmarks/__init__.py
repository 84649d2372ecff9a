"""Measurements that anyone can repeat: ``python -m benchmarks.FOLDER.NAME``, from the root of the checkout."""
