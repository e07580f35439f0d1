import logging

import pytest

from capfinder import log


@pytest.mark.parametrize("cell", ["data[/x].csv", "[red]data.csv", "[bold"])
def test_a_table_shows_its_cells_as_they_are(cell, tmp_path, capsys):
    path = log.start(tmp_path)
    log.table("Files", ("file", "rows"), [(cell, 3)])
    log.stop()
    assert path is not None
    assert cell in path.read_text()
    assert cell in capsys.readouterr().out
    assert not logging.getLogger("capfinder").handlers


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0.0 kB"), (1_234_567, "1.2 MB"), (12_345_000_000, "12.3 GB")]
)
def test_sizes_are_shown_in_a_fitting_unit(size, text):
    assert log.format_bytes(size) == text
