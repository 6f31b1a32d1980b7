"""Regions, blocks and occupancy of a schedule small enough to count by hand."""

import pytest

from kernels_pallas.aot import schedule

UNITS = ("MATMUL", "VALU", "VLOAD:FILL", "VSTORE:SPILL")


def files(bundles: int, branches: dict[int, int], products, vector=()) -> tuple[str, str]:
    """The two files as libtpu writes them: branches {at: target}, units busy at these bundles."""
    lines = ["= control target key start", "LH: loop header", "= control target key end", ""]
    for at in range(bundles):
        what = ""
        if at in branches:
            what = f" %{at} = sbr.rel (!%p{at}_p0) target bundleno = {branches[at]} (0x0) "
        head = f"{hex(at) if at else '   0'} {'LB' if at == 7 else '  '}"
        lines.append(f"  {head}: {'> ' * (at > 7)}{{{what}}}")
    rows = [f"{2 * (at in products)} {3 * (at in vector)} {int(at in vector)} 0"
            for at in range(bundles)]
    head = f"== CAPACTIY:\n{', '.join(UNITS)}\n 4 4 3 1\n== UTILIZATION:\n"
    return "\n".join(lines), head + "\n".join(rows)


def test_blocks_are_where_the_products_are():
    # A loop [10, 95) around two branches, [25, 50) and [65, 90), the second with more vector work,
    # and one without products, [52 + 5, 60).
    branches, products = {20: 50, 52: 60, 60: 90, 90: 10}, {*range(30, 40), *range(70, 80)}
    kernel = schedule.kernel("k", *files(100, branches, products, range(66, 70)))
    assert [(r.kind, r.start, r.end) for r in kernel.regions] == [
        ("kernel", 0, 100), ("loop", 10, 95), ("branch", 25, 50), ("branch", 57, 60),
        ("branch", 65, 90),
    ]
    free, masked = kernel.blocks()
    assert (free.start, masked.start) == (25, 65)
    assert free.cycles == masked.cycles == 25
    assert free.busy == {"MATMUL": 20, "VALU": 0, "VLOAD:FILL": 0, "VSTORE:SPILL": 0}
    assert kernel.occupancy(free) == 20 / (4 * 25)
    assert masked.busy["VALU"] == 12 and masked.busy["VLOAD:FILL"] == 4
    assert kernel.occupancy(masked, "VALU") == 12 / (4 * 25)


def test_a_block_keeps_the_small_branches_within_it():
    # The product's branch [15, 80) starts a copy behind a branch of its own, [45, 50).
    kernel = schedule.kernel("k", *files(90, {10: 80, 40: 50}, range(20, 40)))
    (block,) = kernel.blocks()
    assert (block.start, block.end, block.own) == (15, 80, 40)


def test_a_kernel_without_branches_is_its_own_block():
    (block,) = schedule.kernel("k", *files(30, {}, range(5, 9))).blocks()
    assert (block.kind, block.cycles) == ("kernel", 30)


def test_a_kernel_without_products_is_its_largest_loop():
    (block,) = schedule.kernel("k", *files(90, {30: 10, 80: 40}, ())).blocks()
    assert (block.kind, block.start, block.end) == ("loop", 40, 85)


def test_files_that_do_not_fit_are_refused():
    listing, rows = files(30, {}, ())
    with pytest.raises(ValueError, match="k: 30 bundles of 4 units, but rows .29, 4.: another"):
        schedule.kernel("k", listing, rows.rsplit("\n", 1)[0])


def test_a_folder_is_read_by_kernel_names(tmp_path):
    listing, rows = files(30, {}, range(5, 9))
    for name in ("mine.1", "mine.12", "<late-finalization>", "TLP"):
        (tmp_path / f"17-{name}-65-packed-bundles-post-ra.txt").write_text(listing)
        (tmp_path / f"17-{name}-64-schedule-analysis_packed-bundles-post-ra.txt").write_text("x")
        end = "pre-delay_hlo-static-per-bundle-utilization.txt"
        (tmp_path / f"17-{name}-68-{end}").write_text(rows)
    assert sorted(schedule.read(tmp_path)) == ["mine.1", "mine.12"]
