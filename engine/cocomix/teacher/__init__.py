"""The frozen side: language model, sparse autoencoder, concept labels, soft targets and their caches."""
