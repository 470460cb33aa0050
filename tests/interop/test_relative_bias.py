"""T5's buckets against transformers'."""

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from qlora_pipe.nn.relative_bias import t5_bucket


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 20), (64, 1000)])
def test_buckets_are_those_that_checkpoints_were_trained_with(buckets: int, farthest: int, both_ways: bool) -> None:
    distances = torch.arange(-3000, 3001)
    theirs = T5Attention._relative_position_bucket(distances, both_ways, buckets, farthest)
    assert torch.equal(t5_bucket(distances, buckets=buckets, farthest=farthest, both_ways=both_ways), theirs)
