import torch

from openblip.training.momentum import NO_ID, FeatureQueue, QueueEntries


def entries(start: int, num: int) -> QueueEntries:
    ids = torch.arange(start, start + num)
    features = ids[:, None].float().expand(num, 3)
    return QueueEntries(features, -features, ids, ids + 1000)


def test_the_queue_wraps_a_batch_that_does_not_divide_it() -> None:
    queue = FeatureQueue(5, 3)
    assert (queue.image_ids == NO_ID).all()
    queue.enqueue(entries(0, 4))
    queue.enqueue(entries(4, 3))
    assert queue.image_ids.tolist() == [5, 6, 2, 3, 4]
    assert queue.text_ids.tolist() == [1005, 1006, 1002, 1003, 1004]
    assert queue.image_embedding[:, 0].tolist() == [5, 6, 2, 3, 4]
    assert queue.pointer == 2


def test_of_a_batch_longer_than_the_queue_the_newest_stay() -> None:
    queue = FeatureQueue(3, 3)
    queue.enqueue(entries(0, 8))
    assert sorted(queue.image_ids.tolist()) == [5, 6, 7]
    assert queue.pointer == 8 % 3
