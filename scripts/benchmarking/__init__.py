"""The parts of benchmark_step.py: what is measured beside what, always in turns and in one run."""
