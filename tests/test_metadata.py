"""metadata__*.csv, read block by block."""

import gzip

import polars as pl
import pytest

from capfinder.etl import metadata

TEXT = 'read_id,note,parent_read_id\na,"two\nlines",p\nb,,q\nc,"a ""word""",\n' + "".join(
    f"r{number},,p{number}\n" for number in range(50)
)


@pytest.mark.parametrize("block_bytes", [1, 7, 40, 1 << 20])
@pytest.mark.parametrize("name", ["metadata__a.csv", "metadata__a.csv.gz"])
def test_blocks_together_are_the_table(tmp_path, monkeypatch, block_bytes, name):
    monkeypatch.setattr(metadata, "BLOCK_BYTES", block_bytes)
    opened = gzip.open if name.endswith(".gz") else open
    with opened(tmp_path / name, "wt") as stream:
        stream.write(TEXT)
    found = list(metadata.tables(tmp_path / name))
    assert pl.concat(found).equals(pl.read_csv(TEXT.encode(), infer_schema=False))
    assert (len(found) > 1) == (block_bytes < len(TEXT))


def test_a_file_of_nothing_is_no_table(tmp_path):
    (tmp_path / "metadata__a.csv").touch()
    with pytest.raises(pl.exceptions.NoDataError):
        list(metadata.tables(tmp_path / "metadata__a.csv"))
