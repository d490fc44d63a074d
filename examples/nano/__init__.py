"""The parts of `examples/train_nano.py`: problems, vocabulary, network, optimiser, batches."""
