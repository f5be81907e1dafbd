"""A sweep on a local Ray cluster of two nodes, one of which is killed while it works."""

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.cluster, pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs Ray: pip install '.[ray]'")]

TWO_NODES = """
import threading, time
import ray
from saeutils.kernels import files
from ray.cluster_utils import Cluster
from saeutils.training import finished, sweep

def work(folder, seed):
    time.sleep(1.5)
    return {"seed": seed, "node": ray.get_runtime_context().get_node_id()}

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 10**8})
second = cluster.add_node(num_cpus=1, object_store_memory=10**8)
cluster.wait_for_nodes()
jobs = {f"job {i}": {"seed": i} for i in range(12)}

def kill():
    while not ray.is_initialized():
        time.sleep(0.05)
    (other,) = {node["NodeID"] for node in ray.nodes()} - {ray.get_runtime_context().get_node_id()}
    while not any(other in path.read_text() for path in files.cache_dir("runs").rglob("result.json")):  # it has done a job
        time.sleep(0.05)
    cluster.remove_node(second, allow_graceful=False)
    print("killed, jobs left:", 12 - sum(finished("trial", jobs, work).values()))

threading.Thread(target=kill, daemon=True).start()
found = sweep("trial", jobs, work, ray=cluster.address, progress=False)
assert list(found) == list(jobs) and [r["seed"] for r in found.values()] == list(range(12))
print("nodes", len({r["node"] for r in found.values()}))
"""


def test_a_node_that_dies_loses_no_job(tmp_path):
    env = {"SAEUTILS_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT), "RAY_DEDUP_LOGS": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(TWO_NODES)], capture_output=True, text=True, env=os.environ | env, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search("killed, jobs left: [1-9]", done.stdout) and "nodes 2" in done.stdout, done.stdout
