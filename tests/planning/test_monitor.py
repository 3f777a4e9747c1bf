"""Tests of `planning.monitor`."""

import torch


def test_drift_is_said_aloud():
    from halfbyte.planning.monitor import PeakMonitor

    rows, said = [], []
    monitor = PeakMonitor(
        torch.device("cpu"), {"step": 100 << 20, "load": 1 << 40}, rows.append, said.append
    )
    monitor.note("step", 1, 104 << 20)
    assert not said and rows[0]["planned_bytes"] == 100 << 20
    monitor.note("step", 2, 104 << 20)
    assert len(rows) == 1, "only what is higher"
    monitor.note("step", 3, 110 << 20)
    assert "10% more than the 100 MiB planned" in said[0]
    with monitor.phase("load", 3):
        held = torch.ones(30 << 20, dtype=torch.uint8)
    assert held.nbytes < rows[-1]["measured_bytes"] < 1 << 40
    monitor.highest.pop("load")
    assert monitor.line() == "memory: 110 MiB at the peak, 100 planned (+10.0%)"
