"""The Jobs API of a real head, asked by a host that is no member of the cluster; the head needs ray[default].

What the API answers is in ``tests/contract/test_ray_jobs.py``, against a head that is none. This shows that Ray's own
answers so, and that its nodes inspect themselves.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.inspection.nodes import report_from_log
from cluster.scheduler import ClusterReport
from cluster.versions import submission_versions
from tests.faults.hosts import JOBS_API

pytestmark = pytest.mark.slow

TIMEOUT_S = 600
BEGIN = """\
import sys, time
from cluster.errors import ClusterError
from cluster.scheduler import ENDED, JobRequest
from launcher.config.clusters import load_cluster, open_scheduler

scheduler = open_scheduler(load_cluster(sys.argv[1], [f"cluster.venv={sys.argv[2]}"])[0])
"""
WAIT = """
for _ in range(240):
    try:
        print(scheduler.ray_version())
        break
    except ClusterError as error:
        print(error, file=sys.stderr)
        time.sleep(0.5)
else:
    raise SystemExit("the head does not serve its Jobs API")
"""
INSPECT = """
from cluster.errors import LauncherError
from cluster.inspection.nodes import report_to_text
from cluster.storage.store import Store
from cluster.inspection.store import inspect_cluster

try:
    print(report_to_text(inspect_cluster(scheduler, Store(sys.argv[3]), ("ON_EACH", "ON_HEAD"))))
except LauncherError as error:
    raise SystemExit(str(error))
"""
WITHOUT_DELAY = """
from cluster.kinds import ray_jobs

ray_jobs._INSPECTION_KEPT_S = 0.0
"""
LIVE = """
import json

def wait(ready):
    for _ in range(1200):
        if ready():
            return
        time.sleep(0.1)
    raise SystemExit(f"{scheduler.read('one')}: {scheduler.log('one')}")

COMMAND = "trap 'sleep 5; echo saved; kill $!; exit 0' INT; echo begun $GIVEN $ON_HEAD; sleep 600 & wait"

def begin(run="s3://b/r"):
    return scheduler.begin(
        JobRequest(id="one", command=COMMAND, environment={"GIVEN": "given"}, stop_grace_s=60, metadata={"run": run})
    )

told = {"absent": scheduler.read("one"), "begins": [dict(begin().metadata), dict(begin("s3://b/other").metadata)]}
wait(lambda: "begun given" in scheduler.log("one"))
told["running"] = scheduler.read("one").status
scheduler.stop("one")
wait(lambda: scheduler.read("one").status in ENDED)
told |= {"status": scheduler.read("one").status, "log": scheduler.log("one")}
told["jobs"] = {job.id: job.status for job in scheduler.jobs()}
print(json.dumps(told))
"""
FAIL = """
scheduler.begin(JobRequest(id="two", command="exit 7", environment={}, stop_grace_s=1, metadata={}))
while (job := scheduler.read("two")).status not in ENDED:
    time.sleep(0.1)
print(job.status, job.exit_code)
"""


def test_a_cluster_from_afar(make_hosts, tmp_path: Path) -> None:
    head, second, laptop = make_hosts("head", "second", "laptop")
    head.start_ray(environment={"ON_EACH": "1", "ON_HEAD": "1"}, options=JOBS_API)
    second.start_ray(head, environment={"ON_EACH": "1"})
    for host in (head, second):
        host.wait_for_ray()

    def ask(script: str, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", BEGIN + script, head.jobs_url, sys.prefix]
        command = laptop.command([*words, *arguments], tmp_path, environment)
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)

    def inspect(store: Path, before: str = "") -> ClusterReport:
        asked = ask(before + INSPECT, store)
        assert asked.returncode == 0, asked.stderr
        found = report_from_log(asked.stdout)
        assert found is not None, asked.stdout
        return found

    import ray

    assert ask(WAIT).stdout == f"{ray.__version__}\n", head
    report = inspect(tmp_path / "runs")
    assert {node.address: node.missing for node in report.nodes} == {head.address: (), second.address: ("ON_HEAD",)}
    assert {node.id for node in report.nodes} == {node.id for node in report.capacity.nodes}
    for node in report.nodes:
        assert dict(node.versions) == {**submission_versions(), "ray": ray.__version__}
        assert node.store_error == ""
    assert report.silent == ()
    assert [node.free["CPU"] for node in report.capacity.nodes] == [1.0, 1.0]
    assert not (tmp_path / "runs").exists(), "nothing of the check is left"
    (tmp_path / "file").write_text("")
    refused = ask(INSPECT, tmp_path / "file/runs")
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"{tmp_path}/file/runs: cannot write ")

    lived = ask(LIVE)
    assert lived.returncode == 0, lived.stderr
    told = json.loads(lived.stdout)
    assert (told["absent"], told["begins"], told["running"]) == (None, [{"run": "s3://b/r"}] * 2, "running")
    assert told["status"] == "stopped"
    # Ray writes its own line, of the command, when it comes to it.
    said = [line for line in told["log"].splitlines() if not line.startswith("Running entrypoint")]
    assert said[-2:] == ["begun given 1", "saved"], told["log"]
    inspections = {job: status for job, status in told["jobs"].items() if job.startswith("launcher-inspect-")}
    assert [*inspections.values()] == ["succeeded"]
    assert told["jobs"].keys() == {"one", *inspections}
    assert ask(FAIL).stdout == "failed 7\n"
    refused = ask(INSPECT, tmp_path, RAY_AUTH_TOKEN="b" * 64)
    assert refused.returncode == 1
    assert "does not take this token" in refused.stderr

    second.cut()  # Ray believes for a minute that it is there
    report = inspect(tmp_path / "runs", WITHOUT_DELAY)
    left = ask("\nfor job in scheduler.jobs():\n    print(job.id)").stdout.split()
    assert len([job for job in left if job.startswith("launcher-inspect-")]) == 1, "earlier ones are deleted"
    assert not inspections.keys() & set(left)
    assert ([node.address for node in report.nodes], report.silent) == ([head.address], (second.address,))
