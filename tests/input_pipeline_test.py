"""Batches: reproducible, resumable, split by process; validation counts every token once."""

import numpy as np
import pytest

from nrgpt_jax.datasets import Stream
from nrgpt_jax.datasets import pipeline as input_pipeline
from nrgpt_jax.errors import UserError

TOKENS = np.arange(100, dtype=np.int32)
STREAM = Stream.of(TOKENS, (TOKENS % 3 > 0).astype(np.float32))


def batches(count, seed=0, **kwargs):
    iterator = input_pipeline.train_batches(STREAM, 8, 4, seed, **kwargs)
    return [next(iterator).inputs for _ in range(count)]


def test_targets_follow_inputs_and_carry_their_weights():
    batch = next(input_pipeline.train_batches(STREAM, 8, 4, 0))
    np.testing.assert_array_equal(batch.targets, batch.inputs + 1)
    np.testing.assert_array_equal(batch.weights, batch.targets % 3 > 0)
    assert batch.weights.dtype == np.float32


def test_windows_are_consecutive_tokens_from_anywhere():
    found = np.concatenate(batches(100))
    assert found.shape == (400, 8)
    assert (np.diff(found, axis=1) == 1).all()
    assert set(found[:92, 0]) == set(range(92)), "an epoch visits every start once"
    assert found[:92, 0].tolist() != found[92:184, 0].tolist(), "epochs differ in order"


def test_order_is_a_function_of_the_seed():
    np.testing.assert_array_equal(batches(5), batches(5))
    starts = [batch[:, 0].tolist() for batch in batches(2)]
    assert starts == [[82, 77, 31, 79], [9, 70, 28, 83]], "runs of earlier versions resume"
    assert not np.array_equal(batches(5), batches(5, seed=1))


def test_resuming_continues_the_same_batches():
    np.testing.assert_array_equal(batches(35)[30:], batches(5, first=30))


def test_processes_read_the_rows_of_the_same_batches():
    rows = [0, 3], [1, 2]
    parts = [batches(6, rows=chosen) for chosen in rows]
    for whole, *halves in zip(batches(6), *parts, strict=True):
        for chosen, half in zip(rows, halves, strict=True):
            np.testing.assert_array_equal(half, whole[chosen])
    whole = input_pipeline.validation_batches(STREAM, 8, 5)
    part = input_pipeline.validation_batches(STREAM, 8, 5, rows=[1, 4])
    for all_rows, some in zip(whole, part, strict=True):
        for a, b in zip(all_rows, some, strict=True):
            np.testing.assert_array_equal(a[[1, 4]], b)


@pytest.mark.parametrize("length", [97, 96, 98])
def test_validation_predicts_every_token_once(length):
    seen = []
    for batch in input_pipeline.validation_batches(Stream.of(TOKENS[:length]), 8, 5):
        assert batch.inputs.shape == batch.weights.shape == (5, 8)
        real = batch.weights > 0
        assert (batch.targets[real] == batch.inputs[real] + 1).all()
        seen += batch.targets[real].tolist()
    assert sorted(seen) == list(range(1, length))


def test_validation_keeps_the_weights_of_the_stream():
    found = list(input_pipeline.validation_batches(STREAM, 8, 5))
    counted = np.concatenate([b.targets[b.weights > 0] for b in found])
    assert sorted(counted) == [t for t in range(1, 100) if t % 3]


def test_fixed_validation_windows_are_spread_over_the_split():
    found = list(input_pipeline.validation_batches(STREAM, 8, 2, max_windows=3))
    starts = [b.inputs[i, 0] for b in found for i in range(2) if b.weights[i].any()]
    assert starts == [0, 48, 96]
    again = list(input_pipeline.validation_batches(STREAM, 8, 2, max_windows=3))
    np.testing.assert_array_equal(found[0].inputs, again[0].inputs)


def test_too_short_a_corpus_is_refused():
    with pytest.raises(UserError, match="the train split has 100 tokens"):
        input_pipeline.train_batches(STREAM, 100, 4, 0)
    with pytest.raises(UserError, match="the validation split has nothing to predict"):
        list(input_pipeline.validation_batches(Stream.of(TOKENS[:1]), 8, 4))
