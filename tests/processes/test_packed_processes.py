"""With two processes, `shared_prefix` makes the updates that TRL makes with two, also if they decide differently."""

import launch
import pytest
import two_processes_packed
from tiny.packed import save
from two_processes_packed import DPO, GRPO

CASES = [*(f"GRPO, {case}" for case in GRPO), *(f"DPO, {case}" for case in DPO)]


@pytest.fixture(scope="module")
def two(pair, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    return launch.one_and_two(pair, two_processes_packed, save(tiny_model, folder / "model"), folder)[1]


@pytest.mark.parametrize("case", CASES)
def test_the_update_is_trls_on_both(two, case):
    for result in two:
        ours, theirs = result[case, "ours"]["update"], result[case, "theirs"]["update"]
        assert theirs.norm() > 0 and (ours - theirs).norm() <= 1e-5 * theirs.norm()
        assert (ours - two[0][case, "ours"]["update"]).norm() <= 1e-7 * ours.norm()


@pytest.mark.parametrize("case", CASES)
def test_rows_were_packed(two, case):
    for rank, result in enumerate(two):
        counts = result[case, "ours"]["counts"]["policy"]
        falls_back = rank == 1 and "falls back" in case
        assert (counts["padded"] if falls_back else counts["packed"]) > 0
        assert (counts["packed"] if falls_back else counts["padded"]) == 0


def test_the_rows_of_one_process_only_were_left_out(two):
    first, second = (r["GRPO, rows left out on one process", "ours"]["counts"]["policy"]["packed_tokens"] for r in two)
    assert first <= second / 2
