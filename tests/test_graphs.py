"""Short passes from CUDA graphs."""

import pytest
import torch

from cascade.graphs import GraphRunner
from cascade.shapes import random_model


@pytest.mark.gpu
def test_longer_passes_than_before_get_graphs_of_their_own() -> None:
    """Each size outgrows the buffers of the graphs before it, which are then given up together."""
    model = random_model("tiny", device="cuda", dtype=torch.bfloat16)
    cache = model.cache(max_batch=1, max_length=512, max_draft=256)
    assert isinstance(model.runner, GraphRunner)
    with model.sequence(cache=cache) as sequence:
        sequence.append(list(range(1, 9)), model.largest)
        for proposed in (1, 60, 250, 1):
            sequence.draft(3, model.smallest)
            sequence.commit(0)
            sequence.propose(list(range(proposed)))
            assert sequence.verify(model.largest).isfinite().all()
            sequence.commit(1)
        assert sequence.audit(model.largest).ok
        decoder = model.runner.decoder(cache)
        assert decoder is not None
        assert decoder.graphs
