"""What benchmarks/gpu_check.py measures."""
