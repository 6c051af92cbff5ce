from __future__ import annotations

from pathlib import Path

from cluster.whatif.page import plan_page
from tests.cluster.whatif.plan_questions import HYBRIDS, answer, in_fp8

FOUR = "{name: 'a <b> & c', nodes: [{name: a, device: a100-40g-sxm, devices: 4}]}"


def test_the_page_needs_no_other_file_and_escapes_names(tmp_path: Path) -> None:
    page = plan_page(answer(tmp_path, FOUR))
    assert page.count('src="data:image/png;base64,') == 2 == page.count("<img")
    assert "<script" not in page and "<link" not in page
    assert "a &lt;b&gt; &amp; c" in page and "<b> &" not in page
    assert "data-sheet" in page and "https://www.nvidia.com" in page
    assert page.count("<tr>") == 1 + 32         # a row for each MoE layer


def test_the_page_says_what_fp8_takes_in_files_and_in_memory(tmp_path: Path) -> None:
    cluster = "{nodes: [{name: t4, device: t4}]}"
    page = plan_page(answer(tmp_path, cluster, in_fp8(HYBRIDS[0], tmp_path)))
    assert "GB in files (fp8 in blocks of 128 x 128), " in page and " GB in memory (bfloat16)" in page


def test_a_model_that_does_not_fit_has_a_page_without_pictures(tmp_path: Path) -> None:
    page = plan_page(answer(tmp_path, FOUR, min_copies=2))
    assert "<img" not in page and "does not fit" in page
