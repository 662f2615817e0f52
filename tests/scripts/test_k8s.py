"""The manifests in launch/k8s against schemas, as far as those can be had from PyPI; no cluster is asked.

* TrainJob, TrainingRuntime, Job, Service, PersistentVolumeClaim, and the pod templates of all: the models of
  kubeflow-trainer-api (in the `test` extra). They ignore unknown fields, so each must come back whole from them.
* PyTorchJob outside its pods: the models of kubeflow-training, where it is installed (with its dependencies it takes 59
  MB, so it is in no extra).
* MPIJob v2beta1 and PyTorchJob v1 in whole: their CRDs, where FASTFT_MPIJOB_CRD names mpi-operator's
  manifests/base/kubeflow.org_mpijobs.yaml and FASTFT_PYTORCHJOB_CRD training-operator's
  manifests/base/crds/kubeflow.org_pytorchjobs.yaml (they are in no package); their pods are checked in any case.
"""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

import launch

FOLDER = launch.ROOT / "launch" / "k8s"
FILES = sorted(FOLDER.glob("*.yaml"))
RUN = [p.name for p in FILES if p.stem != "pvc"]  # those that run something


MODELS = {
    "TrainJob": "TrainerV1alpha1TrainJob",
    "TrainingRuntime": "TrainerV1alpha1TrainingRuntime",
    "Job": "IoK8sApiBatchV1Job",
    "Service": "IoK8sApiCoreV1Service",
    "PersistentVolumeClaim": "IoK8sApiCoreV1PersistentVolumeClaim",
}


def load(name: str) -> list[dict]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def job(name: str) -> dict:
    """What is run: the last object of a file."""
    return load(name)[-1]


def pods(name: str) -> list[dict]:
    """Pod specs."""
    found = []
    for manifest in load(name):
        spec = manifest["spec"]
        if manifest["kind"] == "TrainingRuntime":
            jobs = spec["template"]["spec"]["replicatedJobs"]
            found += [j["template"]["spec"]["template"]["spec"] for j in jobs]
        if manifest["kind"] == "Job":
            found.append(spec["template"]["spec"])
        replicas = spec.get("pytorchReplicaSpecs") or spec.get("mpiReplicaSpecs") or {}
        found += [r["template"]["spec"] for r in replicas.values()]
    return found


def test_all_are_there():
    names = ["job", "mpijob", "pvc", "pytorchjob", "trainjob-deepspeed", "trainjob-torch"]
    assert [p.stem for p in FILES] == names


@pytest.mark.parametrize("name", [p.name for p in FILES])
def test_objects_match_their_models(name):
    models = pytest.importorskip("kubeflow_trainer_api.models")
    for manifest in load(name):
        if manifest["kind"] in MODELS:
            assert getattr(models, MODELS[manifest["kind"]]).from_dict(manifest).to_dict() == manifest
    for pod in pods(name):
        assert models.IoK8sApiCoreV1PodSpec.from_dict(pod).to_dict() == pod


def test_a_job_and_its_runtime_belong_together():
    for name in ("trainjob-torch.yaml", "trainjob-deepspeed.yaml"):
        runtime, train = load(name)
        assert train["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
        assert train["spec"]["runtimeRef"]["kind"] == runtime["kind"]
        images = {c["image"] for pod in pods(name) for c in pod["containers"]}
        assert len(images) == 1, "workers have the launcher's image"
        assert runtime["spec"]["template"]["spec"]["failurePolicy"]["maxRestarts"] > 0
    service, plain = load("job.yaml")
    assert plain["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"]["batch.kubernetes.io/job-name"] == plain["metadata"]["name"]
    claim = load("pvc.yaml")[0]["metadata"]["name"]
    volumes = [v for name in RUN for pod in pods(name) for v in pod["volumes"]]
    assert {v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v} == {claim}


def test_a_misspelt_field_is_seen():
    models = pytest.importorskip("kubeflow_trainer_api.models")
    manifest = job("trainjob-torch.yaml")
    manifest["spec"]["trainer"]["numNode"] = 2
    assert models.TrainerV1alpha1TrainJob.from_dict(manifest).to_dict() != manifest


def test_pytorchjob_matches_its_model():
    models = pytest.importorskip("kubeflow.training.models", reason="kubeflow-training is not installed")

    def check(value, kind: str, path: str) -> None:
        model = getattr(models, kind, None)
        if kind.startswith("dict(") and "Kubeflow" in kind:
            for key, item in value.items():
                check(item, kind[len("dict(str, ") : -1], f"{path}.{key}")
        elif model and hasattr(model, "attribute_map") and kind.startswith("Kubeflow"):
            names = {json_name: model.openapi_types[name] for name, json_name in model.attribute_map.items()}
            for key, item in value.items():
                assert key in names, f"{path}.{key} is no field of {kind}"
                check(item, names[key], f"{path}.{key}")
        elif kind in ("str", "int", "bool"):
            assert type(value).__name__ == kind, f"{path} is not a {kind}"

    check(job("pytorchjob.yaml"), "KubeflowOrgV1PyTorchJob", "pytorchjob")


@pytest.mark.parametrize("name", ["mpijob", "pytorchjob"])
def test_manifest_matches_its_crd(name):
    variable = f"FASTFT_{name.upper()}_CRD"
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{variable} does not name the CRD")
    manifest = job(f"{name}.yaml")
    (version,) = [
        v
        for v in yaml.safe_load(Path(path).read_text())["spec"]["versions"]
        if v["name"] == manifest["apiVersion"].split("/")[1]
    ]

    def check(value, schema: dict, where: str) -> None:
        kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
        if schema.get("x-kubernetes-int-or-string"):
            assert isinstance(value, int | str), where
            return
        assert isinstance(value, kinds[schema["type"]]), f"{where} is no {schema['type']}"
        assert value in schema.get("enum", [value]), where
        if isinstance(value, dict) and ("properties" in schema or "additionalProperties" in schema):
            assert set(schema.get("required", [])) <= set(value), f"{where} lacks one of {schema['required']}"
            for key, item in value.items():
                inner = schema.get("properties", {}).get(key) or schema.get("additionalProperties")
                assert inner, f"{where}.{key} is unknown"
                check(item, inner, f"{where}.{key}")
        for i, item in enumerate(value if isinstance(value, list) else []):
            check(item, schema["items"], f"{where}[{i}]")

    check(manifest, version["schema"]["openAPIV3Schema"], name)
    with pytest.raises(AssertionError, match="nonsense is unknown"):
        check({**manifest, "spec": {**manifest["spec"], "nonsense": 1}}, version["schema"]["openAPIV3Schema"], name)


@pytest.mark.parametrize("name", RUN)
def test_pods_have_time_to_save_and_shared_memory(name):
    for pod in pods(name):
        assert pod["terminationGracePeriodSeconds"] > 120
        volumes = {v["name"]: v for v in pod["volumes"]}
        mounts = {m["mountPath"]: m["name"] for c in pod["containers"] for m in c["volumeMounts"]}
        assert "persistentVolumeClaim" in volumes[mounts["/data"]] and set(mounts.values()) == set(volumes)
        if "/dev/shm" in mounts:
            assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        else:
            assert pod["containers"][0]["name"] == "launcher"  # MPIJob: runs no ranks


@pytest.mark.parametrize("name", RUN)
def test_commands(name, tmp_path):
    """The command of each manifest, run by bash with torchrun, mpirun and python that say what they were given."""
    manifest = job(name)
    holders = (
        [manifest["spec"]["trainer"]]
        if manifest["kind"] == "TrainJob"
        else [c for p in pods(name) for c in p["containers"]]
    )
    command = holders[0]["command"]
    (tmp_path / "hostfile").write_text("# hosts\nnode-0.fastft slots=8\nnode-1.fastft slots=8\n")
    for tool, text in {
        "torchrun": 'echo "$@"',
        "python": 'echo "$MASTER_ADDR:$MASTER_PORT" "$@"',
        "mpirun": 'shift 4; exec "$@"',
    }.items():
        (tmp_path / tool).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / tool).chmod(0o755)
    given = {"CONFIG": "/data/my.yaml", "RUN_DIR": "/data/runs/my", "NNODES": "2", "JOB_COMPLETION_INDEX": "1"}
    done = subprocess.run(
        [a.replace("/etc/mpi/hostfile", str(tmp_path / "hostfile")) for a in command],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **given},
        capture_output=True,
        text=True,
        timeout=20,
    )
    before = {
        "job.yaml": "--nnodes 2 --node-rank 1 --nproc-per-node 8 --master-addr fastft-0.fastft --master-port 29500 "
    }
    ranks = "node-0.fastft:29500 " if "mpirun" in " ".join(command) else before.get(name, "")
    expected = f"{ranks}-m fastft train --continue /data/my.yaml run.dir=/data/runs/my"
    assert done.stdout.strip() == expected, done.stderr
