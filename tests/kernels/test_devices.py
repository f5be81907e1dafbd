"""Device placement, on a pretended GPU where there is none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler: the pretended GPU needs one")
def test_sae_and_lm_on_different_devices_meet_and_runs_move_between_devices():
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, str(here / "on_two_devices.py")], capture_output=True, text=True, cwd=here)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
