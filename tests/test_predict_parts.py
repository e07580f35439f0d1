"""What `capfinder predict` is made of: scoring, reading ahead, the text of its rows, labels."""

import contextlib
import csv
import functools
import io
import itertools
from types import SimpleNamespace

import in_process
import jax
import numpy as np
import pytest
import small_models
from csv_input import rows, write
from hypothesis import given
from hypothesis import strategies as st
from small_models import CLASSES as SMALL_CLASSES
from small_models import LENGTH as SMALL_LENGTH
from small_models import SmallModel, small_model

from capfinder import log
from capfinder.data.loader import ONE_DEVICE
from capfinder.errors import StageFailedError
from capfinder.etl.csv_files import Block
from capfinder.etl.csv_reader import scan_block
from capfinder.etl.stream import worker_count
from capfinder.evaluation import composition, metrics, predictions
from capfinder.evaluation.facts import Facts
from capfinder.prediction import reads, result, scoring
from capfinder.prediction.reads import Position, Reads
from capfinder.prediction.tally import FileTally
from capfinder.stages import inference
from capfinder.stages.assembly import TrainedModel

# Scoring


def trained(small: SmallModel) -> TrainedModel:
    parts = (small.model_type, small.hyperparameters, small.module, small.variables)
    return TrainedModel(*parts, SMALL_CLASSES, SMALL_LENGTH, best_epoch=1, num_parameters=0)


def batching(batch_size: int) -> inference.Batching:
    return inference.Batching(batch_size, ONE_DEVICE)


def scored(model: TrainedModel, parts: list[np.ndarray], batch_size: int) -> list[np.ndarray]:
    numbered = zip(parts, range(len(parts)), strict=True)
    found = list(inference.predict(model, numbered, batching(batch_size)))
    assert [payload for _, payload in found] == list(range(len(parts)))
    return [logits for logits, _ in found]


def test_a_read_gets_the_same_bits_wherever_it_stands_in_its_batch(monkeypatch):
    # Large enough for places to differ in their rounding, were the batch no multiple of 48.
    wide = {"stem_filters": 16, "stage_filters": (32,), "stage_kernels": (3,), "stage_blocks": (1,)}
    monkeypatch.setitem(small_models.TINY, "resnet", wide)
    monkeypatch.setattr(small_models, "LENGTH", 62)
    model = trained(small_model("resnet"))
    rng = np.random.default_rng(1)
    signals = rng.normal(size=(1000, 62)).astype(np.float16)
    size = inference.batching(None, mesh=1).batch_size
    (one,) = scored(model, [signals], size)
    order = rng.permutation(1000)
    other = np.concatenate(scored(model, [signals[order[:7]], signals[order[7:]]], size))
    np.testing.assert_array_equal(one[order], other)


def test_logits_are_those_of_the_model_whatever_the_parts():
    small = small_model("cnn_lstm")
    model = trained(small)
    rng = np.random.default_rng(2)
    signals = rng.normal(size=(40, SMALL_LENGTH)).astype(np.float16)
    apply = jax.jit(functools.partial(small.module.apply, train=False))
    expected = apply(small.variables, signals.astype(np.float32)[:, :, None])
    for cuts in ([], [1, 2, 3], [0, 0, 16, 16, 40], [39], range(40)):
        parts = np.split(signals, list(cuts))
        found = scored(model, parts, 16)
        assert list(map(len, found)) == list(map(len, parts))
        np.testing.assert_allclose(np.concatenate(found), expected, atol=2e-6)


def test_out_of_memory_names_the_batch_size_and_what_to_do(monkeypatch):
    def full(*given, **more):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr(inference, "_logits", SimpleNamespace(lower=full))
    signals = np.zeros((3, SMALL_LENGTH), np.float16)
    with pytest.raises(StageFailedError, match=r"scoring 2 reads at once.*--batch_size"):
        scored(trained(small_model("cnn_lstm")), [signals], 2)


def test_memory_that_the_reading_of_files_lacks_is_not_blamed_on_the_batch():
    def parts():
        yield np.zeros((3, SMALL_LENGTH), np.float16), 0
        raise MemoryError("a block of the file")

    given = inference.predict(trained(small_model("cnn_lstm")), parts(), batching(2))
    with pytest.raises(MemoryError, match="a block of the file"):
        list(given)


def test_a_batch_that_no_memory_holds_is_blamed_on_its_size():
    signals = np.zeros((3, SMALL_LENGTH), np.float16)
    with pytest.raises(StageFailedError, match=r"Give a smaller number"):
        scored(trained(small_model("cnn_lstm")), [signals], 2**50)


@pytest.mark.parametrize("of", ["host_bytes", "available_bytes"])
def test_a_batch_that_plainly_needs_more_than_there_is_never_runs(monkeypatch, of):
    """Linux would grant the memory, and then end the process, or another one."""
    reads = 64
    for name in ("host_bytes", "available_bytes"):
        there = reads * SMALL_LENGTH if name == of else 1 << 40
        monkeypatch.setattr(inference.memory, name, lambda there=there: there)
    signals = np.zeros((3, SMALL_LENGTH), np.float16)
    with pytest.raises(StageFailedError, match="scoring 64 reads at once"):
        scored(trained(small_model("cnn_lstm")), [signals], reads)


def test_reads_on_which_the_model_overflows_become_rejects():
    block = Reads(
        file=0,
        read_ids=np.array([b"a", b"b", b"c"]),
        labels=np.array([0, 1, 2]),
        lines=np.array([2, 3, 4]),
        signals=np.zeros((3, 5)),
        figures=np.arange(12.0).reshape(3, 4),
        origins=np.array([[b"x"], [b"y"], [b"z"]]),
        rejects=[],
        following=Position(1),
        disk_bytes=7,
    )
    logits = np.array([[0.0, 1.0], [np.inf, 0.0], [1.0, np.nan]])
    kept, good = scoring.with_numbers(logits, block)
    np.testing.assert_array_equal(kept, [[0.0, 1.0]])
    assert good.read_ids.tolist() == [b"a"] and good.labels.tolist() == [0]
    assert good.figures.tolist() == [[0, 1, 2, 3]] and good.origins.tolist() == [[b"x"]]
    assert good.following == Position(1)
    assert [(r.line, r.read_id, r.reason) for r in good.rejects] == [
        (3, "b", "the model gives no number"),
        (4, "c", "the model gives no number"),
    ]


# Memory: what is asked for follows what is taken


def test_scoring_takes_no_more_of_an_endless_input_than_its_batches_need():
    taken = itertools.count()
    part = np.zeros((5, SMALL_LENGTH), np.float16)
    endless = ((part, next(taken)) for _ in itertools.repeat(None))
    given = inference.predict(trained(small_model("cnn_lstm")), endless, batching(16))
    for number, (_, payload) in enumerate(itertools.islice(given, 50)):
        assert payload == number
    assert next(taken) <= 50 + (inference.AT_ONCE + 2) * 16 / 5


def test_reading_waits_for_the_reads_to_be_taken(tmp_path, monkeypatch):
    count, each = 0, reads.read_blocks

    def counted(path, **more):
        nonlocal count
        for block in each(path, **more):
            count += 1
            yield block

    monkeypatch.setattr(reads, "read_blocks", counted)
    monkeypatch.setattr(reads, "BLOCK_BYTES", 1 << 10)
    path = write(tmp_path / "a.csv", rows(0, 0, 1500))
    blocks = path.stat().st_size >> 10
    most = 2 + 4 * worker_count()  # two a thread being parsed, two a thread waiting for that
    assert blocks > 10 * most
    with contextlib.closing(reads.read([path], target_length=8, dtype="float32")) as given:
        for number in range(1, 30):
            next(given)
            assert count <= number + most


# The text of predictions


def as_csv_writer_has_it(read_ids, labels, probabilities, names, more) -> bytes:
    stream = io.StringIO()
    writer = csv.writer(stream)
    for name, label, likely, rest in zip(read_ids, labels, probabilities, more, strict=True):
        guess = int(np.argmax(likely))
        shown = ["" if label is None else label, guess, names[guess]]
        writer.writerow([name, *shown, *(f"{value:.6f}" for value in likely), *rest])
    return stream.getvalue().encode()


TIES = [(2 * k + 1) / 128 for k in range(64)]  # a seventh decimal 5 and nothing after it
NEAR_TIES = [np.nextafter((k + 0.5) / 1e6, to) for k in (0, 1, 2, 499999) for to in (0, 1)]


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1),
            st.none() | st.integers(-(10**9), 10**9),
            st.lists(
                st.floats(0, 1) | st.sampled_from([*TIES, *NEAR_TIES, 0.0, 1.0]),
                min_size=2,
                max_size=2,
            ),
            st.tuples(*2 * [st.text(st.characters(exclude_characters="\0", codec="utf-8"))]),
        ),
        max_size=5,
    ),
    st.lists(st.text(st.characters(codec="utf-8")), min_size=2, max_size=2),
)
def test_lines_are_those_of_csv_writer_and_a_format_string(given_rows, names):
    read_ids = [name for name, *_ in given_rows]
    labels = [label for _, label, *_ in given_rows]
    likely = np.array([values for _, _, values, _ in given_rows]).reshape(-1, 2)
    more = [texts for *_, texts in given_rows]
    given = (
        np.array([name.encode() for name in read_ids] or [b""], "S")[: len(read_ids)],
        np.array([predictions.NO_LABEL if label is None else label for label in labels], np.int64),
        likely,
        names,
    )
    none = [()] * len(given_rows)
    assert predictions.lines(*given) == as_csv_writer_has_it(read_ids, labels, likely, names, none)
    encoded = np.array([[text.encode() for text in texts] for texts in more] or [[b"", b""]], "S")
    found = predictions.lines(*given, encoded[: len(more)])
    assert found == as_csv_writer_has_it(read_ids, labels, likely, names, more)


def test_class_names_that_are_not_one_a_column_are_refused():
    with pytest.raises(ValueError, match="2 columns of probabilities, 1 class names"):
        predictions.lines(np.array([b"a"]), np.array([0]), np.array([[0.2, 0.8]]), ["cap_0"])


def test_probabilities_are_rounded_as_python_rounds_them():
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [
            rng.random(20_000),
            10 ** rng.uniform(-12, 0, 20_000),
            np.nextafter((rng.integers(0, 10**6, 20_000) + 0.5) / 1e6, rng.integers(0, 2, 20_000)),
            metrics.softmax(rng.normal(0, 5, (10_000, 4))).ravel(),
            TIES * 100,
        ]
    ).reshape(-1, 2)
    text = predictions.lines(
        np.zeros(len(values), "S1"), np.zeros(len(values), int), values, ["", ""]
    ).decode()
    found = [line.split(",")[4:] for line in text.split("\r\n")[:-1]]
    assert found == [[f"{value:.6f}" for value in pair] for pair in values]


# The composition


def composed(classes: int, counts: list[list[int]]) -> dict:
    tallies = [FileTally(classes) for _ in counts]
    for tally, number_of in zip(tallies, counts, strict=True):
        tally.counts[:] = number_of
        tally.ids = id(tally)
    confusion = (90 * np.eye(classes, dtype=int) + 5).tolist()
    names = [f"cap_{number}" for number in range(classes)]
    files = [f"{number}.csv" for number in range(len(counts))]
    return result.compose(files, tallies, names, Facts(test={"confusion_matrix": confusion}))


def shown(found: dict) -> str:
    def show() -> int:
        log.start(None)
        result.show(found)
        log.stop()
        return 0

    return in_process.shown_by(show)[1]


def test_files_beyond_the_bound_of_work_are_not_corrected_and_that_is_said(monkeypatch):
    monkeypatch.setattr(composition, "_MOST_WORK", 2 * 1000 * 12**2)
    found = composed(12, [[5] * 12] * 4)
    for number, part in enumerate([found["all"], *found["files"]]):
        is_corrected = number < 3
        assert part.get("correction") == (None if is_corrected else composition.LEFT_OUT)
        for cap in part["caps"]:
            assert (cap["corrected"] is not None) == is_corrected
            assert (cap["corrected_interval"] is not None) == is_corrected
    assert f"2 of 4 files: {composition.LEFT_OUT}" in " ".join(shown(found).split())


@pytest.mark.parametrize("reads", [1, 3000])
def test_ranges_among_the_shares_of_files_are_explained(reads):
    said = " ".join(shown(composed(2, [[reads, 0], [3000, 0]])).split())
    of_files = said.split("Shares by file, corrected")[1]
    is_explained = "A range (26% to 100%) stands for a share that is hardly known" in of_files
    assert ("% to " in of_files) == is_explained == (reads == 1)


# Labels


@pytest.mark.parametrize(
    ("before", "after", "label"),
    [
        ('a,,"1"', 'a,0,"1"', predictions.NO_LABEL),
        ('"a,b","",1', '"a,b",0,1', predictions.NO_LABEL),
        ('a,-99,"1"', 'a,0,"1"', -99),
        ('a,"-1","1"', 'a,0,"1"', -1),
        ("a,,", "a,0,", predictions.NO_LABEL),
        ('a,3,"1"', None, None),
        ('a,-,"1"', None, None),
        ('a,-x,"1"', None, None),
        ('a,-9999999999,"1"', None, None),
        ('a, ,"1"', None, None),
        ("a,", None, None),
        ("a", None, None),
        (",", None, None),
        ('"a', None, None),
        ('a,"-1', None, None),
        ("x" * 200 + ",,1", None, None),
    ],
)
def test_only_empty_and_negative_labels_are_taken_for_unknown(before, after, label):
    """As if `after` stood there, but for the label; and anything else as it always is."""
    data = f'z,1,"2"\n{before}\r\n\ny,2,"3"'
    rows, rejects, count = scanned(data, no_label=predictions.NO_LABEL)
    if after is None:
        assert outcome(rows, rejects, count) == outcome(*scanned(data))
        return
    plain_rows, plain_rejects, plain_count = scanned(data.replace(before, after))
    plain_rows.cap_class[plain_rows.line == 8] = label
    assert outcome(rows, rejects, count) == outcome(plain_rows, plain_rejects, plain_count)
    assert (8 in rows.line) == (before != "a,,")  # that one has no signal either


def scanned(data, **how):
    return scan_block(Block(data.encode(), offset=100, line=7), cap_class=None, **how)


def outcome(rows, rejects, count):
    columns = (rows.read_id, rows.cap_class, rows.line, rows.end - rows.start, rows.samples)
    return [column.tolist() for column in columns], rejects, count
