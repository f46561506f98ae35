"""Settings that must stand before anything is imported."""

import os

# Tests run on as many workers as there are cores; more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
