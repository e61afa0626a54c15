"""What benchmarks/gpu_check.py measures, section by section (README.md here)."""
