"""What fusedopt gains on this machine: ``python -m fusedopt.bench``."""
