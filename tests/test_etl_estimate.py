import gzip

import pytest
from csv_input import HEADER, rows, write_classes
from test_etl import debris, make_config, run

from capfinder.errors import InputError
from capfinder.stages import etl


@pytest.mark.parametrize("ending", [".csv", ".csv.gz"])
def test_reads_and_bytes_are_foretold_within_a_tenth(tmp_path, ending):
    data = tmp_path / "caps"
    data.mkdir()
    for cap_class in range(2):
        lines = [HEADER, *rows(cap_class, 0, 6000, low=200, high=400)]
        text = "".join(f"{line}\r\n" for line in lines).encode()
        packed = gzip.compress(text, 1) if ending == ".csv.gz" else text
        (data / f"data__cap_{cap_class}{ending}").write_bytes(packed)
    expected = etl.expect(make_config(data, tmp_path / "out", etl_params__examples_per_class=1000))
    assert expected.reads == pytest.approx(12_000, rel=0.1)
    assert expected.text_bytes == pytest.approx(2 * len(text), rel=0.1)
    assert expected.chosen == 2000
    assert expected.seconds > 0
    few = etl.expect(make_config(data, tmp_path / "out", etl_params__examples_per_class=10))
    assert few.chosen == 20
    assert few.disk_bytes < expected.disk_bytes


def test_the_disk_that_a_build_takes_is_within_what_was_foretold(tmp_path):
    data = write_classes(tmp_path / "caps", reads=2000)
    config = make_config(data, tmp_path / "out", shared_params__target_length=500)
    expected = etl.expect(config)
    directory = etl.run(config).dataset.directory
    written = sum(path.stat().st_size for path in directory.iterdir())
    assert written < expected.disk_bytes < 10 * written + 60_000_000


def test_too_little_space_is_said_before_the_start_and_nothing_is_left(tmp_path):
    data = write_classes(tmp_path / "caps")
    for path in data.iterdir():
        with path.open("r+b") as stream:
            stream.truncate(4 * 10**12)  # a hole: takes no room, but nobody has read it yet
    with pytest.raises(InputError, match=r"needs [\d,.]+ GB of disk, [\d,.]+ [GM]B are free"):
        run(data, tmp_path / "out", split_params__keep_all=True)
    assert debris(tmp_path / "out") == []
