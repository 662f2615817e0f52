"""The manifests in launch/k8s against schemas, as far as those can be had from PyPI; no cluster is asked.

* TrainJob, and the pod templates of all: the models of kubeflow-trainer-api (in the `test` extra). They ignore unknown
  fields, so each manifest must come back whole from them.
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


def load(name: str) -> dict:
    return yaml.safe_load((FOLDER / name).read_text())


def pods(manifest: dict) -> list[dict]:
    """Pod specs (or, in a TrainJob, patches of them)."""
    spec = manifest["spec"]
    if manifest["kind"] == "TrainJob":
        jobs = [
            j for p in spec["runtimePatches"] for j in p["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        ]
        return [j["template"]["spec"]["template"]["spec"] for j in jobs]
    return [
        r["template"]["spec"]
        for r in spec["pytorchReplicaSpecs" if manifest["kind"] == "PyTorchJob" else "mpiReplicaSpecs"].values()
    ]


def test_all_four_are_there():
    assert [p.stem for p in FILES] == ["mpijob", "pytorchjob", "trainjob-deepspeed", "trainjob-torch"]


@pytest.mark.parametrize("name", ["trainjob-torch.yaml", "trainjob-deepspeed.yaml"])
def test_trainjob_matches_its_model(name):
    models = pytest.importorskip("kubeflow_trainer_api.models")
    manifest = load(name)
    assert models.TrainerV1alpha1TrainJob.from_dict(manifest).to_dict() == manifest


@pytest.mark.parametrize("name", ["mpijob.yaml", "pytorchjob.yaml"])
def test_pods_match_their_model(name):
    models = pytest.importorskip("kubeflow_trainer_api.models")
    for pod in pods(load(name)):
        assert models.IoK8sApiCoreV1PodSpec.from_dict(pod).to_dict() == pod


def test_a_misspelt_field_is_seen():
    models = pytest.importorskip("kubeflow_trainer_api.models")
    manifest = load("trainjob-torch.yaml")
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

    check(load("pytorchjob.yaml"), "KubeflowOrgV1PyTorchJob", "pytorchjob")


@pytest.mark.parametrize("name", ["mpijob", "pytorchjob"])
def test_manifest_matches_its_crd(name):
    variable = f"FASTFT_{name.upper()}_CRD"
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{variable} does not name the CRD")
    manifest = load(f"{name}.yaml")
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


@pytest.mark.parametrize("name", [p.name for p in FILES])
def test_pods_have_time_to_save_and_shared_memory(name):
    for pod in pods(load(name)):
        assert pod["terminationGracePeriodSeconds"] > 120
        volumes = {v["name"]: v for v in pod["volumes"]}
        mounts = {m["mountPath"]: m["name"] for c in pod["containers"] for m in c["volumeMounts"]}
        assert "persistentVolumeClaim" in volumes[mounts["/data"]] and set(mounts.values()) == set(volumes)
        if "/dev/shm" in mounts:
            assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        else:
            assert pod["containers"][0]["name"] == "launcher"  # MPIJob: runs no ranks


@pytest.mark.parametrize("name", [p.name for p in FILES])
@pytest.mark.parametrize("saved", [False, True])
def test_commands_train_then_resume(name, saved, tmp_path):
    """The command of each manifest, run by bash with torchrun, mpirun and python that say what they were given."""
    manifest = load(name)
    holders = (
        [manifest["spec"]["trainer"]]
        if manifest["kind"] == "TrainJob"
        else [c for p in pods(manifest) for c in p["containers"]]
    )
    command = holders[0]["command"]
    (tmp_path / "hostfile").write_text("# hosts\nnode-0.fastft slots=8\nnode-1.fastft slots=8\n")
    for tool, text in {
        "torchrun": 'echo "$@"',
        "python": 'echo "$RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $MASTER_ADDR:$MASTER_PORT" "$@"',
        "mpirun": "shift 4; OMPI_COMM_WORLD_RANK=9 OMPI_COMM_WORLD_SIZE=16 OMPI_COMM_WORLD_LOCAL_RANK=1 "
        'OMPI_COMM_WORLD_LOCAL_SIZE=8 exec "$@"',
    }.items():
        (tmp_path / tool).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / tool).chmod(0o755)
    run = tmp_path / "run"
    if saved:
        (run / "checkpoints").mkdir(parents=True)
        (run / "checkpoints" / "LATEST").touch()
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CONFIG": "/data/my.yaml", "RUN_DIR": str(run)}
    done = subprocess.run(
        [a.replace("/etc/mpi/hostfile", str(tmp_path / "hostfile")) for a in command],
        env=env,
        capture_output=True,
        text=True,
        timeout=20,
    )
    expected = f"-m fastft resume {run}" if saved else f"-m fastft train /data/my.yaml run.dir={run}"
    ranks = "9/16 1/8 node-0.fastft:29500 " if "mpirun" in " ".join(command) else ""
    assert done.stdout.strip() == ranks + expected, done.stderr
