"""Jobs whose surroundings fail: the operator, and what a team forgot."""

from __future__ import annotations

from testkit import installation
from testkit.jobs import JOBS, completed, hashes, small_job, trains
from testkit.kube import condition


def test_the_operator_may_die_while_a_job_runs(platform, module_team, undisturbed):
    cluster = platform.cluster
    cluster.apply(small_job("orphan", module_team), namespace=module_team)
    trains(cluster, "orphan", module_team)
    cluster.kubectl("delete", "pods", "--all", "-n", platform.operator_namespace, "--grace-period=0", "--force")
    job = completed(cluster, "orphan", module_team)
    assert job["status"]["attempt"] == 1
    assert hashes(job) == hashes(undisturbed)


def test_a_missing_secret_is_waited_for_and_named(platform, team):
    cluster = platform.cluster
    job = small_job("no-secret", team)
    job["spec"]["credentials"]["secretRef"]["name"] = "later"
    cluster.apply(job, namespace=team)
    found = cluster.wait_for(
        JOBS,
        "no-secret",
        lambda found: (found.get("status", {}).get("pending") or {}).get("cause") == "MissingSecret",
        namespace=team,
        timeout=180,
    )
    assert "later" in found["status"]["pending"]["detail"] + found["status"]["pending"]["hint"]
    cluster.apply(installation.secret("later", platform.s3.credentials), namespace=team)
    # The kubelet tries to mount again after a pause that grows to two minutes.
    passed = cluster.wait_for(
        JOBS,
        "no-secret",
        lambda found: condition(found, "PreflightPassed").get("status") == "True",
        namespace=team,
        timeout=180,
    )
    assert passed["status"]["counters"].get("failures", 0) == 0
