"""What is said of a machine."""

import torch

from tinydm.benchmark import machine
from tinydm.benchmark.machine import instruction_set, label


def test_instruction_sets_in_words():
    flags = {"fpu", "avx2", "avx512f", "avx512_vnni", "amx_tile"}
    assert instruction_set("AVX512", flags, "") == "AVX512, VNNI, AMX"
    assert instruction_set("AVX2", {"avx2"}, "") == "AVX2"
    assert instruction_set("AVX2", flags, "AVX2") == "AVX2, ONEDNN_MAX_CPU_ISA=AVX2"


def test_facts_of_the_processor(tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text("model name\t: Some Processor\nflags\t\t: avx_vnni\n")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "")
    facts = machine.machine(torch.device("cpu"), 1)
    capability = torch.backends.cpu.get_cpu_capability()
    assert label(facts) == f"Some Processor, {capability}, VNNI, 1 thread"
    assert facts["torch"] == torch.__version__ and len(facts["date"]) == 10
    assert label(facts | {"threads": 2}).endswith("2 threads")
