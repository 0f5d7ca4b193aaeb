"""Rows that are cut short while training."""

from __future__ import annotations

import torch

from dht.crop import BY_TOKEN, Crop

LENGTHS = (4, 20, 9, 12)


def padded():
    """Row r holds the tokens 100 r, 100 r + 1, ...; labels as many as there are tokens."""
    mask = (torch.arange(20) < torch.tensor(LENGTHS)[:, None]).long()
    ids = (torch.arange(4)[:, None] * 100 + torch.arange(20)) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": mask * 7, "labels": torch.ones(4, 20)}


def test_a_longer_row_keeps_its_ends_and_a_window_between_them():
    starts = set()
    for step in range(40):
        batch = Crop(9, 100, seed=1)(padded(), step)
        assert {name: tuple(batch[name].shape) for name in BY_TOKEN} == dict.fromkeys(BY_TOKEN, (4, 9))
        assert torch.equal(batch["labels"], torch.ones(4, 20)), "labels are not by token, whatever their shape"
        assert batch["attention_mask"].sum(-1).tolist() == [4, 9, 9, 9]
        assert torch.equal(batch["token_type_ids"], batch["attention_mask"] * 7)
        for row, length in enumerate(LENGTHS):
            said = (batch["input_ids"][row] - 100 * row)[: min(length, 9)].tolist()
            assert (said[0], said[-1]) == (0, length - 1)
            between = said[1:-1]
            assert between == list(range(between[0], between[0] + len(between)))
            if length == 20:
                starts.add(between[0])
    assert starts == set(range(1, 13)), "every window is drawn now and then"


def test_the_same_step_cuts_alike_and_another_one_does_not():
    def drawn(seed=3, **where):
        return Crop(5, 100, seed)(padded(), **where)["input_ids"].tolist()

    assert drawn(step=4) == drawn(step=4)
    assert len({str(drawn(step=4)), str(drawn(step=5)), str(drawn(step=4, part="1")), str(drawn(9, step=4))}) == 4


def test_short_rows_and_later_steps_stay_as_they_are():
    batch = padded()
    assert Crop(9, 6, 0)(batch, 6) is batch
    assert Crop(20, 6, 0)(batch, 0) is batch
