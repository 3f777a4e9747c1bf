"""Tests of `memory.streaming`."""

from pathlib import Path

from halfbyte.memory.mapped_files import resident_bytes
from halfbyte.memory.streaming import LayerStreamer

from ..helpers import MIB


def test_a_travel_holds_two_groups(tmp_path: Path):
    file = tmp_path / "bytes"
    file.write_bytes(bytes(range(256)) * 4096 * 8)  # 8 MiB
    streamer = LayerStreamer()
    layers = [streamer.tensor(number, file, number * MIB, MIB) for number in range(8)]
    whole = resident_bytes(layers[0], 8 * MIB)
    for number in [*range(8), *reversed(range(8))]:
        streamer.use(number)
        assert int(layers[number].long().sum()) == 255 * 128 * 4096
        assert resident_bytes(layers[0], 8 * MIB) <= whole + 3 * MIB
    assert streamer.nbytes == 8 * MIB
