"""tinydm doctor on a made-up project folder with known answers, and on the real one."""

import hashlib

import pytest

from models import diffusion
from tinydm import cli, doctor

CPUINFO = """processor\t: 0
model name\t: Some Processor 9000
flags\t\t: fpu avx2 avx512f avx512_vnni amx_tile

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty folder in place of the project, the current folder and the caches."""
    monkeypatch.setattr(doctor, "PROJECT", tmp_path)
    monkeypatch.setattr(diffusion, "PROJECT", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def by_name(findings):
    return {finding.what: finding for finding in findings}


def test_processor_name_and_flags():
    name, flags = doctor.processor(CPUINFO)
    assert name == "Some Processor 9000"
    assert flags == {"fpu", "avx2", "avx512f", "avx512_vnni", "amx_tile"}
    assert doctor.processor("") == ("", set())


def test_what_the_processor_computes(monkeypatch):
    memory = "MemTotal:  4194304 kB\nMemAvailable:  1048576 kB\n"
    monkeypatch.setattr(doctor, "_read", lambda path: CPUINFO if "cpu" in path else memory)
    found = by_name(doctor.computer())
    assert found["it computes"].found == "AVX2, AVX-512, VNNI, AMX"
    assert found["memory"].found == "1.0 GiB free of 4.0"


def test_shipped_weights_are_intact_damaged_or_missing(project):
    names = "good", "bad", "gone"
    sums = "".join(f"{hashlib.sha256(n.encode()).hexdigest()}  {n}.safetensors\n" for n in names)
    write(project / "SHA256SUMS", sums.encode())
    write(project / "good.safetensors", b"good")
    write(project / "bad.safetensors", b"bat")
    good, bad, gone = doctor.shipped(project)
    assert good == doctor.Finding("good", "intact")
    assert bad.found.startswith("has SHA256 ") and bad.remedy == "restore it from the repository"
    assert gone.is_missing and gone.remedy == bad.remedy


def test_checkpoints_are_there_or_come_with_their_command(project):
    place = "diffusion_models_converted/ema_diffusion_cifar10_model/model-790000.ckpt"
    write(project / "cache" / place)
    write(project / "models/64x64_diffusion.pt")
    found = by_name(doctor.checkpoints())
    assert found["cifar10"].found == str(project / "cache" / place)
    assert found["guided-imagenet64"].found == str(project / "models/64x64_diffusion.pt")
    assert str(found["bedroom"]).endswith(
        "missing; would enable LDM-4 LSUN bedroom 256x256, 2.4 GB: tinydm download bedroom"
    )
    assert sum(finding.is_missing for finding in found.values()) == len(found) - 2


def test_what_scores_and_prompts_need(project):
    assert all(finding.is_missing and finding.remedy for finding in doctor.references())
    file = project / "torch/hub/checkpoints/pt_inception-2015-12-05-6726825d.pth"
    write(file, b"not the weights")
    write(project / "data/cifar-10-batches-py/batches.meta")
    for name in ("vocab.json", "merges.txt"):
        write(project / "models/tokenizer/clip-vit-large-patch14" / name)
    inception, cifar, clip = doctor.references()
    assert inception.found == f"{file} is damaged" and inception.remedy
    assert not cifar.remedy and not clip.remedy


def test_missing_packages_say_what_they_would_enable(monkeypatch):
    monkeypatch.setattr(doctor, "version_of", lambda name: doctor.MISSING)
    assert "- torch " in doctor.report({"Packages": [*doctor.packages()]})
    assert [line for line in map(str, doctor.extras()) if "submitit" in line] == [
        f"- {'submitit':26} missing; would enable comparisons as jobs, launcher=local|slurm: "
        "pip install 'submitit>=1.5.2'"
    ]
    assert [line for line in map(str, doctor.extras()) if "transformers" in line] == [
        f"- {'transformers':26} missing; would enable Stable Diffusion's prompts: "
        "pip install 'transformers>=4.57'"
    ]
    # without PyTorch, what needs it is not looked at
    assert "Devices" not in doctor.examine()


def test_the_command_prints_every_section(capsys):
    cli.main(["doctor"])
    printed = capsys.readouterr().out
    for heading in doctor.examine():
        assert f"{heading}\n" in printed
    for name in ("cifar10-compact", "latent-compact", "cifar10-classifier-stats"):
        assert f"  {name:26} intact\n" in printed


def test_it_takes_no_words(capsys):
    with pytest.raises(SystemExit):
        cli.main(["doctor", "x=1"])
    assert capsys.readouterr().err == "error: doctor takes no words, found x=1\n"


def test_packages_it_looks_for_are_those_of_the_project_file():
    from scripts.dependencies import PROJECT_FILE, requirements

    listed = {entry.split(">")[0] for entry in requirements(PROJECT_FILE.read_text())}
    assert doctor.NEEDED.keys() <= listed
