"""Tables of known numbers."""

from dataclasses import replace

import pytest

from tinydm.benchmark.report import Row, duration, markdown, megabytes, not_measured, told

FAST = {
    "name": "Chip",
    "isa": "AVX512, VNNI",
    "threads": 2,
    "torch": "2.15.0",
    "date": "2026-01-02",
}
SLOW = FAST | {"isa": "AVX2"}
ROW = Row(
    network="net",
    batch=8,
    steps=0,
    machine=FAST,
    bytes={"fp32": 143_000_000, "W8": 35_750_000, "W4": 18_000_000},
    rounds=5,
    clean=3,
    watched=True,
    seconds={
        "fp32": [0.8, 0.2, 0.5],
        "simulated w4a8": [1.6, 0.4, 1.0],
        "integer w4a8": [0.2, 0.1, 0.25],
        "integer w8a8": [0.2, 0.2, 0.25],
    },
    failed={"bf16": "emulated."},
)
RUN = replace(
    ROW, steps=20, seconds={"fp32": [6.0] * 3, "integer w4a8": [3.75, 3.75, 1.0]}, failed={}
)
TABLE = """\
**One forward pass: Chip, AVX512, VNNI, 2 threads, torch 2.15.0, 2026-01-02.** Times faster than \
fp32 eager NCHW. Rounds with more than 6% of the machine in other hands are dropped.

|  | net b8 |
| --- | --- |
| fp32 eager NCHW, time | 500 ms |
| simulated W4A8 | 0.50 |
| integer, eager glue W4A8 | 2.00 |
| integer, eager glue W8A8 | 2.00 |
| integer, eager glue W4A8 against simulated W4A8 | 4.00 |
| integer, eager glue W4A8 against integer, eager glue W8A8 | 1.00 |
| clean rounds | 3 of 5 |

- Not measured: bf16 autocast channels_last: emulated.

**Whole runs of 20 DDIM steps: Chip, AVX512, VNNI, 2 threads, torch 2.15.0, 2026-01-02.** Times \
faster than fp32 eager NCHW; in parentheses the share of the forward pass's gain that is left. \
Rounds with more than 6% of the machine in other hands are dropped.

|  | net b8 |
| --- | --- |
| fp32 eager NCHW, time | 6.00 s |
| integer, eager glue W4A8 | 1.60 (80%) |
| clean rounds | 3 of 5 |

**File, MB** (1e6 bytes, and how many times smaller): first and last layer at 8 bits.

|  | fp32 | W8 | W4 |
| --- | --- | --- | --- |
| net | 143 | 35.8 (4.00x) | 18.0 (7.94x) |
"""


def test_tables_of_a_machine():
    assert markdown([RUN, ROW]) == TABLE


def test_every_machine_has_its_own_table_and_a_column_for_each_network_and_batch():
    other = replace(ROW, batch=1, seconds={"fp32": [1.0], "channels_last": [0.8]}, failed={})
    page = markdown([ROW, replace(ROW, machine=SLOW), other])
    assert page.count("One forward pass: Chip") == 2 and page.count("**File, MB**") == 1
    assert "|  | net b8 | net b1 |" in page and "| simulated W4A8 | 0.50 | – |" in page
    assert "| fp32 eager channels_last | – | 1.25 |" in page
    assert "- Not measured (net b8): bf16 autocast channels_last: emulated.\n" in page


def test_reasons_are_told_once():
    row = replace(ROW, failed={"openvino": "absent", "onnxruntime": "absent", "bf16": "emulated"})
    lines = not_measured([row, replace(row, batch=1)])
    assert lines == [
        "- Not measured: OpenVINO fp32; ONNX Runtime fp32: absent.",
        "- Not measured: bf16 autocast channels_last: emulated.",
        "",
    ]


def test_no_clean_round_is_no_number():
    page = markdown([replace(ROW, clean=0, seconds={key: [] for key in ROW.seconds})])
    assert "| fp32 eager NCHW, time | – |\n| clean rounds | 0 of 5 |" in page
    assert "no round counts" in told(replace(ROW, clean=0, seconds={}))
    assert "No round was dropped: " in markdown([replace(ROW, watched=False)])


def test_a_row_is_told_with_its_instruction_set():
    lines = told(ROW).splitlines()
    assert lines[0].startswith(
        "net b8; Chip, AVX512, VNNI, 2 threads, torch 2.15.0, 2026-01-02; 3 "
    )
    assert lines[3].split() == ["integer,", "eager", "glue", "W4A8", "200", "ms", "2.00x"]
    assert lines[-1].split() == "bf16 autocast channels_last not measured: emulated.".split()


def test_places():
    assert ROW.place == ("Chip, AVX512, VNNI, 2 threads", "net", 8, 0)
    assert replace(ROW, machine=FAST | {"date": "2027-01-01"}).place == ROW.place
    assert len({row.place for row in (ROW, RUN, replace(ROW, machine=SLOW))}) == 3


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.00425, "4.25 ms"),
        (0.0425, "42.5 ms"),
        (0.4251, "425 ms"),
        (1.7, "1.70 s"),
        (99, "99.0 s"),
    ],
)
def test_durations_have_three_digits(seconds, text):
    assert duration(seconds) == text


def test_megabytes():
    assert [megabytes(size) for size in (1_840_000, 99_000_000, 1_096_000_000)] == [
        "1.8",
        "99.0",
        "1096",
    ]
