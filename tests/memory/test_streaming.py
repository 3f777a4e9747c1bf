"""Tests of `memory.streaming`."""

from pathlib import Path

import pytest

from halfbyte.errors import ModelError
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


def test_a_file_that_was_cut_is_named_before_it_is_read(tmp_path: Path):
    """Reading behind its end would end the process."""
    file = tmp_path / "weights"
    file.write_bytes(bytes(range(256)) * 256)
    streamer = LayerStreamer()
    tensors = [streamer.tensor(group, file, group * 4096, 4096) for group in range(3)]
    streamer.use(0)
    assert int(tensors[0][5]) == 5
    with file.open("r+b") as opened:
        opened.truncate(4096)
    with pytest.raises(ModelError, match="was cut while") as caught:
        streamer.use(1)
    assert caught.value.exit_code == 6 and "4,096 bytes" in caught.value.found
