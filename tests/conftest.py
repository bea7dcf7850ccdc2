"""Tests import the stage files from the folder above and leave a core to their neighbours."""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the same tests everywhere
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several tests run several processes
sys.path.insert(0, str(Path(__file__).parent.parent))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C otherwise
