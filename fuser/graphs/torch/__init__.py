"""torch.fx graphs, seen through the vocabulary; `graph.TorchGraph` is the way in."""
