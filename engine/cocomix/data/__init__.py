"""Text -> tokens: sources, tokenizers, token files, and windows in their order."""
