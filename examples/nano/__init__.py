"""The parts of `examples/train_nano.py`: problems, solutions, network, optimizer, batches."""
